"""Runs one checked request on the engine and responds to it, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.disconnect import until_disconnect
from ulysses_infer.server.http.errors import JSON, ApiError, timeout_error
from ulysses_infer.server.http.generation import Generation, Prompt, generate
from ulysses_infer.server.http.outputs import Output, Outputs
from ulysses_infer.server.http.protocol.common import EngineFields
from ulysses_infer.server.http.sse import ChunkWriter, EventStream


class ChoiceBuilder(Protocol):
    """Builds the choices of one output, in the shape of its endpoint."""

    def whole(self) -> dict[str, Any]:
        """The choice of a whole response."""

    def chunks(self) -> list[dict[str, Any]]:
        """The choices of the next chunks, with what is new since the last call; empty if nothing is."""


def no_fields(_: Outputs) -> dict[str, Any]:
    """Default for `prompt_fields`: no fields."""
    return {}


@dataclass(frozen=True)
class PreparedRequest:
    """A checked request, ready to run."""

    body: EngineFields
    generation: Generation
    kind: str
    """The response's `object`."""
    chunk_kind: str
    """The `object` of a chunk."""
    new_choice: Callable[[Output], ChoiceBuilder]
    prompt_fields: Callable[[Outputs], dict[str, Any]] = no_fields
    """Fields of a whole response that describe its prompt."""
    keeps_tokens: bool = True


async def respond(request: Request, context: AppContext, prepared: PreparedRequest) -> Response:
    """Run a request while its client is connected. Raises errors that occur before the response has begun."""
    timeout = context.config.server.request_timeout
    eos_token_ids = context.engine_info().eos_token_ids
    outputs = Outputs(context.texts, prepared.generation, eos_token_ids, prepared.keeps_tokens)
    choices = [prepared.new_choice(output) for output in outputs.all]
    if prepared.body.stream:
        return EventStream(_events(context, prepared, outputs, choices), timeout)
    try:
        async with asyncio.timeout(timeout):
            whole = _whole(context, prepared, outputs, choices)
            return json_response(await until_disconnect(request.receive, whole))
    except TimeoutError:
        raise timeout_error(timeout or 0) from None


def json_response(value: Any) -> Response:
    """`value` as a JSON response."""
    return Response(msgspec.json.encode(value), media_type=JSON)


async def _whole(
    context: AppContext, prepared: PreparedRequest, outputs: Outputs, choices: Sequence[ChoiceBuilder]
) -> dict[str, Any]:
    async with aclosing(_run(context, prepared.generation, outputs)) as batches:
        async for _ in batches:
            pass
    return {
        **_head(context, prepared.generation, prepared.kind),
        "choices": [choice.whole() for choice in choices],
        "usage": outputs.usage(),
        **prepared.prompt_fields(outputs),
    }


async def _events(
    context: AppContext, prepared: PreparedRequest, outputs: Outputs, choices: Sequence[ChoiceBuilder]
) -> AsyncGenerator[bytes]:
    options = prepared.body.stream_options
    has_usage = bool(options and options.include_usage)
    is_continuous = bool(options and options.continuous_usage_stats)
    writer = ChunkWriter(_head(context, prepared.generation, prepared.chunk_kind), has_usage)
    async with aclosing(_run(context, prepared.generation, outputs)) as batches:
        async for touched in batches:
            chunks = [chunk for output in touched for chunk in choices[output.index].chunks()]
            more = {"usage": outputs.usage()} if is_continuous else None
            if chunks:
                yield b"".join([writer.chunk(chunk, more) for chunk in chunks])
    if has_usage:
        yield writer.usage(outputs.usage())


async def _run(context: AppContext, generation: Generation, outputs: Outputs) -> AsyncGenerator[list[Output]]:
    """Run the request on the engine; yields the outputs that received tokens, each time some arrive."""
    with context.registered(generation.id, generation.request_ids):
        async with aclosing(generate(context.client, generation)) as batches:
            async for position, batch in batches:
                yield outputs.take(position, batch)


def _head(context: AppContext, generation: Generation, kind: str) -> dict[str, Any]:
    """The fields that all chunks of a response share."""
    return {
        "id": generation.id,
        "object": kind,
        "created": int(time.time()),
        "model": generation.adapter or context.model_name,
        "system_fingerprint": context.fingerprint,
    }


def generation_of(
    context: AppContext, prefix: str, body: EngineFields, prompts: list[Prompt], params: SamplingParams
) -> Generation:
    """The engine requests of an HTTP request, under a new id. Its model may be the name of an adapter."""
    name = f"{prefix}-{body.request_id or uuid.uuid4().hex}"
    model = context.choose_model(body.model)
    adapter = model if model in context.config.lora.adapters else None
    return Generation(name, prompts, params, body.priority or 0, body.cache_salt or "", adapter)


def check_streaming(body: EngineFields) -> None:
    """Raises `ApiError` for options that cannot be streamed, or that require streaming."""
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs cannot be streamed; leave out stream", param="prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true; leave it out", param="stream_options")
