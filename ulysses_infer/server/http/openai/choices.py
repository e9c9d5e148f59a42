"""Responses made of choices: completions and chat completions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.generation import Generation
from ulysses_infer.server.http.outputs import Output, Outputs
from ulysses_infer.server.http.protocol.common import EngineFields
from ulysses_infer.server.http.respond import PreparedRequest
from ulysses_infer.server.http.sse import DONE, ChunkWriter, event


class ChoiceBuilder(Protocol):
    """Builds the choices of one output, in the shape of its endpoint."""

    def whole(self) -> dict[str, Any]:
        """The choice of a whole response."""

    def chunks(self) -> list[dict[str, Any]]:
        """The choices of the next chunks, with what is new since the last call; empty if nothing is."""

    @property
    def num_reasoning_tokens(self) -> int | None:
        """How many tokens of the output were reasoning; None if outputs are not parsed for it."""


def no_fields(_: Outputs) -> dict[str, Any]:
    """Default for `prompt_fields`: no fields."""
    return {}


@dataclass(frozen=True)
class ChoiceKind:
    """What one endpoint's responses are."""

    name: str
    """The `object` of a whole response."""
    chunk_name: str
    """The `object` of a chunk."""
    new_choice: Callable[[Output], ChoiceBuilder]
    prompt_fields: Callable[[Outputs], dict[str, Any]] = no_fields
    """Fields of a whole response that describe its prompt."""


class ChoiceWriter:
    """Writes a response with choices."""

    def __init__(
        self, context: AppContext, body: EngineFields, generation: Generation, kind: ChoiceKind, outputs: Outputs
    ) -> None:
        self._context, self._generation, self._kind, self._outputs = context, generation, kind, outputs
        self._choices = [kind.new_choice(output) for output in outputs.all]
        options = body.stream_options
        self._has_usage = bool(options and options.include_usage)
        self._is_continuous = bool(options and options.continuous_usage_stats)
        self._chunks = ChunkWriter(self._head(kind.chunk_name), self._has_usage)

    def whole(self) -> dict[str, Any]:
        """The whole response."""
        return {
            **self._head(self._kind.name),
            "choices": [choice.whole() for choice in self._choices],
            "usage": self._usage(),
            **self._kind.prompt_fields(self._outputs),
        }

    def events(self, touched: Sequence[Output]) -> bytes:
        """The next chunks."""
        chunks = [chunk for output in touched for chunk in self._choices[output.index].chunks()]
        more = {"usage": self._usage()} if self._is_continuous else None
        return b"".join([self._chunks.chunk(chunk, more) for chunk in chunks])

    def last_events(self) -> bytes:
        """The chunk with the usage, if requested, and the end."""
        return (self._chunks.usage(self._usage()) if self._has_usage else b"") + DONE

    def failure(self, error: ApiError) -> bytes:
        """`{"error": …}` and the end, as in other servers, so that no client waits for more."""
        return event(error.body) + DONE

    def _usage(self) -> dict[str, Any]:
        usage = self._outputs.usage()
        counts = [count for choice in self._choices if (count := choice.num_reasoning_tokens) is not None]
        if counts:
            usage["completion_tokens_details"] = {"reasoning_tokens": sum(counts)}
        return usage

    def _head(self, kind: str) -> dict[str, Any]:
        """The fields that all chunks of a response share."""
        return {
            "id": self._generation.id,
            "object": kind,
            "created": int(time.time()),
            "model": self._generation.adapter or self._context.model_name,
            "system_fingerprint": self._context.fingerprint,
        }


def prepared_choices(
    context: AppContext, body: EngineFields, generation: Generation, kind: ChoiceKind, keeps_tokens: bool = True
) -> PreparedRequest[ChoiceWriter]:
    """A request whose response has choices."""
    return PreparedRequest(
        generation,
        bool(body.stream),
        lambda outputs: ChoiceWriter(context, body, generation, kind, outputs),
        keeps_tokens,
    )
