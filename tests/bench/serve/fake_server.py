"""A server with enough of OpenAI's format, known delays, and every kind of misbehaviour."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any

END = b"0\r\n\r\n"


@dataclass
class Script:
    """How to answer a completion."""

    first: float = 0.0
    """Seconds to the first token."""
    gap: float = 0.0
    """Seconds from token to token."""
    ending: str = "complete"
    """complete | no finish_reason | no [DONE] | cut | error event | abort | 503 | junk | silence"""
    has_usage: bool = True


@dataclass
class FakeServer:
    """Use it with `async with`. Requests are recorded with their arrival times."""

    script: Script = field(default_factory=Script)
    has_tokenizer: bool = True
    drops_idle: bool = False
    """Close the connection after an answer that announced keep-alive."""
    tls: ssl.SSLContext | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)
    tokens: list[list[float]] = field(default_factory=list)
    """For each request, the times at which its tokens were sent."""
    num_connections: int = 0
    url: str = ""

    async def __aenter__(self) -> FakeServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                length = next((int(line[15:]) for line in lines if line.lower().startswith("content-length:")), 0)
                body = json.loads(await reader.readexactly(length)) if length else None
                self.heads.append(head.decode())
                await self._answer(lines[0].split(" ")[1], body, writer)
                if self.drops_idle or writer.is_closing():
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client left
        finally:
            writer.close()

    async def _answer(self, path: str, body: Any, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            send_json(writer, {"object": "list", "data": [{"id": "fake"}]})
        elif path == "/tokenize" and self.has_tokenizer:
            tokens = [ord(character) for character in body["prompt"]]
            send_json(writer, {"tokens": tokens, "count": len(tokens)})
        elif path in ("/v1/completions", "/v1/chat/completions"):
            self.moments.append(time.perf_counter())
            self.bodies.append(body)
            await self._complete(body, "chat" in path, writer)
        else:
            send_json(writer, {"error": {"message": "there is no such page"}}, 404)
        await writer.drain()

    async def _complete(self, body: dict[str, Any], is_chat: bool, writer: asyncio.StreamWriter) -> None:
        script = self.script
        if script.ending == "503":
            send_json(writer, {"error": {"message": "the queue is full"}}, 503)
            return
        if script.ending == "junk":
            writer.write(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")
            return
        if script.ending == "silence":
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        count = body["max_tokens"]
        if is_chat:
            send_event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        due = time.perf_counter() + script.first
        sent: list[float] = []
        self.tokens.append(sent)
        for number in range(count):
            await sleep_until(due)
            is_last = number == count - 1 and script.ending != "no finish_reason"
            reason = ("abort" if script.ending == "abort" else "length") if is_last else None
            text = {"delta": {"content": "x"}} if is_chat else {"text": "x"}
            sent.append(time.perf_counter())
            send_event(writer, {"choices": [{"index": 0, **text, "finish_reason": reason}]})
            if number == count // 2 and script.ending in ("cut", "error event"):
                self._break(writer)
                return
            due += script.gap
        if script.has_usage:
            length = len(body["prompt"]) if "prompt" in body else 7
            send_event(writer, {"choices": [], "usage": {"prompt_tokens": length, "completion_tokens": count}})
        if script.ending != "no [DONE]":
            send_chunk(writer, b"data: [DONE]\n\n")
        writer.write(END)

    def _break(self, writer: asyncio.StreamWriter) -> None:
        if self.script.ending == "cut":
            writer.close()
            return
        send_event(writer, {"error": {"message": "rank 1 died", "type": "server_error"}})
        send_chunk(writer, b"data: [DONE]\n\n")
        writer.write(END)


async def sleep_until(moment: float) -> None:
    while (left := moment - time.perf_counter()) > 0:
        await asyncio.sleep(left)


def send_json(writer: asyncio.StreamWriter, content: Any, status: int = 200) -> None:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} Whatever\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


def send_event(writer: asyncio.StreamWriter, content: Any) -> None:
    send_chunk(writer, b"data: " + json.dumps(content).encode() + b"\n\n")


def send_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
