"""Output items: what one output becomes, and the events that tell of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from ulysses_infer.server.http.output_reader import OutputEvent
from ulysses_infer.server.reasoning import ReasoningDelta
from ulysses_infer.server.tool_calls import ArgumentsDelta, CallStarted, ContentDelta

Item = dict[str, Any]
Event = dict[str, Any]
Logprobs = Sequence[dict[str, Any]]


class OutputItems:
    """Items of type reasoning, message and function_call, built while an output arrives."""

    def __init__(self) -> None:
        self.all: list[Item] = []
        self._is_open = False

    def add(self, read: OutputEvent, logprobs: Logprobs = ()) -> Iterator[Event]:
        """Add what is new, with the log-probabilities of its tokens; yields the events."""
        match read:
            case ReasoningDelta(text):
                yield from self._enter("reasoning")
                yield from self._add_text("reasoning_text", text)
            case ContentDelta(text):
                yield from self._enter("message")
                yield from self._add_text("output_text", text, logprobs)
            case CallStarted(_, call_id, name):
                yield from self.close()
                yield from self._open({"type": "function_call", "call_id": call_id, "name": name, "arguments": ""})
            case ArgumentsDelta(_, text):
                self.all[-1]["arguments"] += text
                yield self._event("response.function_call_arguments.delta", delta=text)

    def close(self, status: str = "completed") -> Iterator[Event]:
        """End the newest item. status: completed or incomplete."""
        if not self._is_open:
            return
        self._is_open, item = False, self.all[-1]
        item["status"] = status
        if item["type"] == "function_call":
            arguments = item["arguments"]
            yield self._event("response.function_call_arguments.done", arguments=arguments, name=item["name"])
        else:
            yield from self._close_part(item["content"][0])
        yield {"type": "response.output_item.done", "output_index": len(self.all) - 1, "item": _copy(item)}

    def _enter(self, kind: str) -> Iterator[Event]:
        """Begin an item of a kind, unless the newest is of that kind and open."""
        if self._is_open and self.all[-1]["type"] == kind:
            return
        yield from self.close()
        more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        yield from self._open({"type": kind, **more, "content": []})

    def _open(self, item: Item) -> Iterator[Event]:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[item["type"]]
        self._is_open = True
        self.all.append({"id": f"{prefix}_{uuid.uuid4().hex}", **item, "status": "in_progress"})
        yield {"type": "response.output_item.added", "output_index": len(self.all) - 1, "item": _copy(self.all[-1])}

    def _add_text(self, kind: str, text: str, logprobs: Logprobs = ()) -> Iterator[Event]:
        content = self.all[-1]["content"]
        is_answer = kind == "output_text"
        if not content:
            content.append({"type": kind, "text": "", **({"annotations": [], "logprobs": []} if is_answer else {})})
            yield self._event("response.content_part.added", content_index=0, part=_copy(content[0]))
        content[0]["text"] += text
        if is_answer:
            content[0]["logprobs"] += logprobs
        more = {"logprobs": list(logprobs)} if is_answer else {}
        yield self._event(f"response.{kind}.delta", content_index=0, delta=text, **more)

    def _close_part(self, part: dict[str, Any]) -> Iterator[Event]:
        more = {"logprobs": part["logprobs"]} if part["type"] == "output_text" else {}
        yield self._event(f"response.{part['type']}.done", content_index=0, text=part["text"], **more)
        yield self._event("response.content_part.done", content_index=0, part=_copy(part))

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self.all[-1]["id"], "output_index": len(self.all) - 1, **fields}


def _copy(item: Item) -> Item:
    """A copy that later text does not change."""
    copy = dict(item)
    for key, value in item.items():
        if isinstance(value, list):
            copy[key] = [dict(part) for part in value]
    return copy
