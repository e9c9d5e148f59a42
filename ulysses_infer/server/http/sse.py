"""Server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ulysses_infer.server.http.disconnect import until_disconnect
from ulysses_infer.server.http.errors import ApiError, api_error, error_response, timeout_error

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # otherwise nginx would buffer events
]
_encode = msgspec.json.Encoder().encode


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event with `data` as JSON, and its type if it has one."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return b"".join((head, b"data: ", _encode(data), b"\n\n"))


def split_events(data: bytes) -> list[bytes]:
    """Events that were joined, one by one. JSON has no empty lines, so they end at the first."""
    return [each + b"\n\n" for each in data.split(b"\n\n")[:-1]]


class ChunkWriter:
    """Writes the chunks of one stream. Everything but the choice is the same in all, so it is encoded once."""

    def __init__(self, common: Mapping[str, Any], has_usage: bool) -> None:
        self._head = b"data: " + _encode(common)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if has_usage else b"]}\n\n"

    def chunk(self, choice: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> bytes:
        """The event of one choice. more: additional keys, such as usage."""
        if more is None:
            return b"".join((self._head, _encode(choice), self._tail))
        return b"".join((self._head, _encode(choice), b"],", _encode(more)[1:], b"\n\n"))

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """The event that has only the usage."""
        return b"".join((self._head, b'],"usage":', _encode(usage), b"}\n\n"))


class EventStream(Response):
    """Sends events as a generator produces them, and always closes it.

    Nothing is sent before the first event, so an earlier error has its own status. `failure` writes the events of a
    later one. If the client disconnects, the generator is closed at once.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], timeout: float | None, failure: Callable[[ApiError], bytes]
    ) -> None:
        super().__init__()
        self._events, self._timeout, self._failure = events, timeout, failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        await until_disconnect(receive, self._run(scope, receive, send))

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_started = False
        try:
            async with aclosing(self._events) as events, asyncio.timeout(self._timeout):
                async for data in events:
                    if not is_started:
                        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                        is_started = True
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            last = b""
        except Exception as error:  # sent to the client, and logged if unexpected
            known = timeout_error(self._timeout or 0) if isinstance(error, TimeoutError) else error
            if not is_started:
                await error_response(known, scope["path"])(scope, receive, send)
                return
            last = self._failure(api_error(known))
        await send({"type": "http.response.body", "body": last, "more_body": False})
