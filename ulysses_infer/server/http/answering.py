"""Turns the engine's tokens into the answer of one HTTP request, whole or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Protocol

from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.generation import Generation, Prompt, generate
from ulysses_infer.server.http.outputs import Output, Outputs
from ulysses_infer.server.http.protocol.common import EngineFields
from ulysses_infer.server.http.sse import ChunkWriter


class Choice(Protocol):
    """Writes one output, in the shape of its route."""

    def whole(self) -> dict[str, Any]:
        """The choice of a whole answer."""

    def chunks(self) -> list[dict[str, Any]]:
        """The choices of the chunks that tell what came since the last time; none if there is nothing to tell."""


class Answering:
    """A request that is checked and ready to run: once, as a whole answer or as events."""

    kind: ClassVar[str]
    """The answer's `object`."""
    chunk_kind: ClassVar[str]
    """That of a chunk."""

    def __init__(
        self, context: AppContext, body: EngineFields, generation: Generation, keeps_tokens: bool = True
    ) -> None:
        self.context, self.body, self.generation = context, body, generation
        self.outputs = Outputs(context.texts, generation, context.engine_info().eos_token_ids, keeps_tokens)
        self.choices: Sequence[Choice] = [self.choice(output) for output in self.outputs.all]

    def choice(self, output: Output) -> Choice:
        """What writes `output`."""
        raise NotImplementedError

    def of_prompt(self) -> dict[str, Any]:
        """Keys of a whole answer that tell of its prompt."""
        return {}

    async def answer(self) -> dict[str, Any]:
        """The whole answer."""
        async with aclosing(self._touched()) as batches:
            async for _ in batches:
                pass
        choices = [choice.whole() for choice in self.choices]
        return {**self._common(self.kind), "choices": choices, "usage": self.outputs.usage(), **self.of_prompt()}

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events, as it comes."""
        options = self.body.stream_options
        has_usage = bool(options and options.include_usage)
        is_continuous = bool(options and options.continuous_usage_stats)
        writer = ChunkWriter(self._common(self.chunk_kind), has_usage)
        async with aclosing(self._touched()) as batches:
            async for touched in batches:
                chunks = [chunk for output in touched for chunk in self.choices[output.index].chunks()]
                more = {"usage": self.outputs.usage()} if is_continuous else None
                if chunks:
                    yield b"".join([writer.chunk(chunk, more) for chunk in chunks])
        if has_usage:
            yield writer.usage(self.outputs.usage())

    async def _touched(self) -> AsyncGenerator[list[Output]]:
        """Run the request: the outputs that got tokens, each time some came."""
        context, generation = self.context, self.generation
        with context.registered(generation.id, generation.request_ids):
            async with aclosing(generate(context.client, generation)) as batches:
                async for position, batch in batches:
                    yield self.outputs.take(position, batch)

    def _common(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.generation.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.generation.adapter or self.context.model_name,
            "system_fingerprint": self.context.fingerprint,
        }


def generation_of(
    context: AppContext, prefix: str, body: EngineFields, prompts: list[Prompt], params: SamplingParams
) -> Generation:
    """The work that a request asks for, under an id of its own; its model may be the name of an adapter."""
    name = f"{prefix}-{body.request_id or uuid.uuid4().hex}"
    adapter = body.model if body.model in context.config.lora.adapters else None
    return Generation(name, prompts, params, body.priority or 0, body.cache_salt or "", adapter)


def check_streaming(body: EngineFields) -> None:
    """Raises `ApiError` for what cannot be streamed, or only makes sense if it is."""
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs cannot be streamed; leave out stream", param="prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true; leave it out", param="stream_options")
