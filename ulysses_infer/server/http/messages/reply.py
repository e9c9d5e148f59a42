"""The response to a request of Anthropic's API: blocks of thinking, text and tool use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.generation import Generation
from ulysses_infer.server.http.messages.request import chat_request
from ulysses_infer.server.http.openai.chat import Chat, read_chat
from ulysses_infer.server.http.output_reader import OutputEvent
from ulysses_infer.server.http.outputs import Delta, Output, Outputs
from ulysses_infer.server.http.protocol.messages import MessagesRequest
from ulysses_infer.server.http.respond import PreparedRequest, generation_of
from ulysses_infer.server.http.sse import event
from ulysses_infer.server.reasoning import ReasoningDelta
from ulysses_infer.server.tool_calls import ArgumentsDelta, CallStarted, ContentDelta

Event = dict[str, Any]
USAGE_ONCE = {"cache_creation": None, "inference_geo": None, "service_tier": "standard"}
"""Fields of a message's usage, which the API requires, that its changes in a stream do not repeat."""


async def prepare_message(context: AppContext, body: MessagesRequest) -> PreparedRequest[MessageWriter]:
    """Check a request and render its prompt.

    Raises `ApiError`, `RequestError`, `OverloadedError`, `EngineDeadError`.
    """
    request = chat_request(body)
    chat = await read_chat(context, request)
    generation = generation_of(context, "msg_", request, [chat.prompt], chat.params)
    return PreparedRequest(
        generation, bool(body.stream), lambda outputs: MessageWriter(context, generation, chat, outputs)
    )


class MessageWriter:
    """Writes one message."""

    def __init__(self, context: AppContext, generation: Generation, chat: Chat, outputs: Outputs) -> None:
        self._id, self._model = generation.id, generation.adapter or context.model_name
        self._outputs, self._output = outputs, outputs.all[0]
        self._reader = chat.form.reader(chat.prompt.text or "")
        self._blocks: list[dict[str, Any]] = []
        self._arguments = ""  # of the newest block, a tool's use
        self._is_open = self._has_started = False

    def whole(self) -> dict[str, Any]:
        """The whole message."""
        delta = self._output.flush()
        for _ in self._new(delta):
            pass
        message = {**self._message(), "content": self._blocks, **self._ending(delta)}
        return {**message, "usage": {**self._usage(), **USAGE_ONCE}}

    def events(self, touched: Sequence[Output]) -> bytes:
        """Events of what is new."""
        events: list[Event] = []
        if not self._has_started:
            self._has_started = True
            usage = {**self._usage(), **USAGE_ONCE}
            message = {**self._message(), "content": [], **_ending_with(None), "usage": usage}
            events.append({"type": "message_start", "message": message})
        delta = self._output.flush()
        events += self._new(delta)
        if delta.finish_reason is not None:
            events.append({"type": "message_delta", "delta": self._ending(delta), "usage": self._usage()})
        return _written(events)

    def last_events(self) -> bytes:
        """The end of the stream."""
        return _written([{"type": "message_stop"}])

    def failure(self, error: ApiError) -> bytes:
        """The error as an event."""
        return _written([error.anthropic_body])

    def _message(self) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model}

    def _new(self, delta: Delta) -> Iterator[Event]:
        """Add what is new to the blocks; yields the stream's events."""
        for read in self._reader.read(delta):
            yield from self._add(read)
        if delta.finish_reason is not None:
            yield from self._close()

    def _add(self, read: OutputEvent) -> Iterator[Event]:
        match read:
            case ReasoningDelta(text):
                yield from self._add_text({"type": "thinking", "thinking": "", "signature": ""}, "thinking", text)
            case ContentDelta(text):
                yield from self._add_text({"type": "text", "text": "", "citations": None}, "text", text)
            case CallStarted(_, identifier, name):
                call = {"type": "tool_use", "id": identifier, "name": name, "input": {}, "caller": {"type": "direct"}}
                yield from self._open(call)
            case ArgumentsDelta(_, text):
                self._arguments += text
                yield self._delta({"type": "input_json_delta", "partial_json": text})

    def _add_text(self, empty: dict[str, Any], key: str, text: str) -> Iterator[Event]:
        if not self._is_open or self._blocks[-1]["type"] != empty["type"]:
            yield from self._open(empty)
        self._blocks[-1][key] += text
        yield self._delta({"type": f"{key}_delta", key: text})

    def _open(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self._is_open, self._arguments = True, ""
        self._blocks.append(block)
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> Iterator[Event]:
        if self._is_open:
            self._is_open = False
            if self._blocks[-1]["type"] == "tool_use":
                self._blocks[-1]["input"] = _object(self._arguments)
            yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _ending(self, delta: Delta) -> dict[str, Any]:
        stop = delta.stop_reason if isinstance(delta.stop_reason, str) else None
        if delta.finish_reason == "length":
            return _ending_with("max_tokens")
        if stop is not None and delta.finish_reason == "stop":
            return _ending_with("stop_sequence", stop)
        return _ending_with("tool_use" if self._reader.has_calls else "end_turn")

    def _usage(self) -> dict[str, Any]:
        usage = self._outputs.usage()
        num_cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"thinking_tokens": self._reader.num_reasoning_tokens or 0},
            "server_tool_use": None,
        }


def _ending_with(reason: str | None, sequence: str | None = None) -> dict[str, Any]:
    """Why a message has ended; nothing yet if `reason` is None."""
    return {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None, "container": None}


def _written(events: Sequence[Event]) -> bytes:
    return b"".join([event(each, each["type"]) for each in events])


def _object(arguments: str) -> dict[str, Any]:
    """A call's arguments; of an output that was cut within them, none."""
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
