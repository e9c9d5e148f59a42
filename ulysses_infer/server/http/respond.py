"""Runs one checked request on the engine and responds to it, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ulysses_infer.errors import ReplicaLostError
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.disconnect import until_disconnect
from ulysses_infer.server.http.errors import JSON, ApiError, timeout_error
from ulysses_infer.server.http.generation import Generation, Prompt, generate
from ulysses_infer.server.http.outputs import Output, Outputs
from ulysses_infer.server.http.protocol.common import EngineFields
from ulysses_infer.server.http.sse import EventStream


class ResponseWriter(Protocol):
    """Writes the response to one request in the shape of its API, from outputs that grow."""

    def whole(self) -> dict[str, Any]:
        """The whole response, once all outputs are complete."""

    def events(self, touched: Sequence[Output]) -> bytes:
        """Events of what is new in `touched`; may be empty. The first ones open the stream."""

    def last_events(self) -> bytes:
        """Events after all outputs are complete."""

    def failure(self, error: ApiError) -> bytes:
        """The last events of a stream that fails."""


W = TypeVar("W", bound=ResponseWriter)


@dataclass(frozen=True)
class PreparedRequest(Generic[W]):
    """A checked request, ready to run."""

    generation: Generation
    streams: bool
    new_writer: Callable[[Outputs], W]
    keeps_tokens: bool = True
    """False: only the prompt's tokens are returned."""


class Run(Generic[W]):
    """One request on the engine, and the writer of its response."""

    def __init__(self, context: AppContext, prepared: PreparedRequest[W]) -> None:
        self._context, self._prepared, self._generation = context, prepared, prepared.generation
        self._begin()

    def _begin(self) -> None:
        context, prepared = self._context, self._prepared
        eos_token_ids = context.engine_info().eos_token_ids
        self.outputs = Outputs(context.texts, prepared.generation, eos_token_ids, prepared.keeps_tokens)
        self.writer: W = prepared.new_writer(self.outputs)

    async def whole(self) -> dict[str, Any]:
        """The response, after the request has ended. Of a replica that dies nothing was sent: another one begins
        again."""
        while True:
            try:
                async with aclosing(self._batches()) as batches:
                    async for _ in batches:
                        pass
                return self.writer.whole()
            except ReplicaLostError:
                self._begin()

    async def events(self) -> AsyncGenerator[bytes]:
        """The events of the response, as tokens arrive."""
        async with aclosing(self._batches()) as batches:
            async for touched in batches:
                data = self.writer.events(touched)
                if data:
                    yield data
        yield self.writer.last_events()

    async def _batches(self) -> AsyncGenerator[list[Output]]:
        """Yields the outputs that received tokens, each time some arrive."""
        generation = self._generation
        with self._context.registered(generation.id, generation.request_ids):
            async with aclosing(generate(self._context.client, generation)) as batches:
                async for position, batch in batches:
                    yield self.outputs.take(position, batch)


async def respond(request: Request, context: AppContext, prepared: PreparedRequest[W]) -> Response:
    """Run a request while its client is connected. Raises errors that occur before the response has begun."""
    timeout = context.config.server.request_timeout
    run = Run(context, prepared)
    if prepared.streams:
        return EventStream(run.events(), timeout, run.writer.failure)
    try:
        async with asyncio.timeout(timeout):
            return json_response(await until_disconnect(request.receive, run.whole()))
    except TimeoutError:
        raise timeout_error(timeout or 0) from None


def json_response(value: Any) -> Response:
    """`value` as a JSON response."""
    return Response(msgspec.json.encode(value), media_type=JSON)


def generation_of(
    context: AppContext, prefix: str, body: EngineFields, prompts: list[Prompt], params: SamplingParams
) -> Generation:
    """The engine requests of an HTTP request, under a new id. Its model may be the name of an adapter."""
    name = f"{prefix}{body.request_id or uuid.uuid4().hex}"
    adapter = context.adapter_of(context.choose_model(body.model))
    return Generation(
        name, prompts, params, body.priority or 0, body.cache_salt or "", adapter, body.prompt_cache_key or ""
    )


def check_streaming(body: EngineFields) -> None:
    """Raises `ApiError` for options that cannot be streamed, or that require streaming."""
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs cannot be streamed; leave out stream", param="prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true; leave it out", param="stream_options")
