"""/v1/completions: a request to the engine's work, its outputs to choices."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.generation import Generation, Prompt, generate
from ulysses_infer.server.http.logprobs import LegacyLogprobs, TokenNames, prompt_logprobs
from ulysses_infer.server.http.outputs import Delta, Output, Outputs
from ulysses_infer.server.http.protocol.common import EngineFields
from ulysses_infer.server.http.protocol.completions import CompletionRequest
from ulysses_infer.server.http.sampling import sampling_params, structured_outputs
from ulysses_infer.server.http.sse import ChunkWriter


class Completion:
    """One request to /v1/completions, checked and ready to run."""

    def __init__(self, context: AppContext, body: CompletionRequest, generation: Generation) -> None:
        self._context, self._body, self._generation = context, body, generation
        self._outputs = Outputs(
            context.texts, generation, context.engine_info().eos_token_ids, keeps_tokens=body.max_tokens != 0
        )
        self._choices = [CompletionChoice(context, body, output, generation.params) for output in self._outputs.all]

    async def answer(self) -> dict[str, Any]:
        """The whole answer."""
        context, generation = self._context, self._generation
        with context.registered(generation.id, generation.request_ids):
            async with aclosing(generate(context.client, generation)) as batches:
                async for position, batch in batches:
                    self._outputs.take(position, batch)
        choices = [choice.write(output.flush()) for choice, output in self._pairs()]
        return {**self._common(), "choices": choices, "usage": self._outputs.usage()}

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events, as it comes."""
        context, generation, options = self._context, self._generation, self._body.stream_options
        has_usage = bool(options and options.include_usage)
        is_continuous = bool(options and options.continuous_usage_stats)
        writer = ChunkWriter(self._common(), has_usage)
        with context.registered(generation.id, generation.request_ids):
            async with aclosing(generate(context.client, generation)) as batches:
                async for position, batch in batches:
                    choices = self._news(self._outputs.take(position, batch))
                    more = {"usage": self._outputs.usage()} if is_continuous else None
                    if choices:
                        yield b"".join([writer.chunk(choice, more) for choice in choices])
        if has_usage:
            yield writer.usage(self._outputs.usage())

    def _pairs(self) -> list[tuple[CompletionChoice, Output]]:
        return list(zip(self._choices, self._outputs.all, strict=True))

    def _news(self, touched: list[Output]) -> list[dict[str, Any]]:
        written = [(self._choices[output.index], output.flush()) for output in touched]
        return [choice.write(delta) for choice, delta in written if choice.is_worth_sending(delta)]

    def _common(self) -> dict[str, Any]:
        return {
            "id": self._generation.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._context.model_name,
            "system_fingerprint": self._context.fingerprint,
        }


class CompletionChoice:
    """Writes one output: whole, or the next chunk of it."""

    def __init__(self, context: AppContext, body: CompletionRequest, output: Output, params: SamplingParams) -> None:
        self._texts, self._body, self._output = context.texts, body, output
        self._is_first = True
        self._logprobs = None
        if body.logprobs is not None:
            names = TokenNames(context.texts, bool(body.return_tokens_as_token_ids))
            before = () if body.echo else output.source.prompt.token_ids
            self._logprobs = LegacyLogprobs(context.texts, names, params.skip_special_tokens, before)

    def is_worth_sending(self, delta: Delta) -> bool:
        """Whether a chunk would say anything."""
        says_tokens = self._logprobs is not None or bool(self._body.return_token_ids)
        return bool(delta.text or delta.finish_reason or self._is_first or (says_tokens and delta.tokens))

    def write(self, delta: Delta) -> dict[str, Any]:
        """The choice with what came since the last time, after the prompt if it is echoed."""
        text = delta.text
        if self._is_first and self._body.echo:
            text = self._echo() + text
        choice: dict[str, Any] = {
            "index": self._output.index,
            "text": text,
            "logprobs": self._written_logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            choice["prompt_token_ids"] = self._output.source.prompt.token_ids if self._is_first else None
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs()
        self._is_first = False
        return choice

    def _echo(self) -> str:
        prompt = self._output.source.prompt
        if self._logprobs is not None and self._output.source.start is not None:
            scores = self._output.source.start.prompt_logprobs or [None] * len(prompt.token_ids)
            for token_id, scored in zip(prompt.token_ids, scores, strict=True):
                self._logprobs.add(token_id, scored, self._body.logprobs or 0)
        return prompt.text if prompt.text is not None else self._texts.decode(prompt.token_ids)

    def _written_logprobs(self, delta: Delta) -> dict[str, list[Any]] | None:
        if self._logprobs is None:
            return None
        for token in delta.tokens:
            self._logprobs.add(token.token_id, token.logprobs, self._body.logprobs or 0)
        return self._logprobs.take()

    def _prompt_logprobs(self) -> list[dict[str, Any] | None] | None:
        start = self._output.source.start
        if start is None or start.prompt_logprobs is None:
            return None
        return prompt_logprobs(self._texts, start.prompt_logprobs)


async def make_completion(context: AppContext, body: CompletionRequest) -> Completion:
    """Check a request and read its prompts. Raises `ApiError`, `RequestError`, `OverloadedError`, `EngineDeadError`."""
    context.check_model(body.model)
    _check(body)
    changes: dict[str, Any] = {"logprobs": body.logprobs, "structured_outputs": structured_outputs(body)}
    if body.max_tokens == 0:
        changes |= {"max_tokens": 1, "min_tokens": 0}  # the engine computes no prompt without sampling after it
    if body.echo and body.logprobs is not None:
        changes["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    params = sampling_params(body, **changes)
    context.engine_info()
    prompts = [await _read(context, prompt, body.add_special_tokens is not False) for prompt in body.prompt]
    return Completion(context, body, generation_of("cmpl", body, prompts, params))


def generation_of(prefix: str, body: EngineFields, prompts: list[Prompt], params: SamplingParams) -> Generation:
    """The work that a request asks for, under an id of its own."""
    name = f"{prefix}-{body.request_id or uuid.uuid4().hex}"
    return Generation(name, prompts, params, body.priority or 0, body.cache_salt or "")


def check_streaming(body: EngineFields) -> None:
    """Raises `ApiError` for what cannot be streamed, or only makes sense if it is."""
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs cannot be streamed; leave out stream", param="prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true; leave it out", param="stream_options")


def check_token_ids(context: AppContext, token_ids: list[int]) -> list[int]:
    """Token ids that the model has. Raises `ApiError`."""
    vocab_size = context.engine_info().vocab_size
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        message = f"token id {largest} is outside the vocabulary; use 0 to {vocab_size - 1}"
        raise ApiError(400, message, param="prompt")
    return token_ids


def _check(body: CompletionRequest) -> None:
    check_streaming(body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        message = f"best_of is {body.best_of}, but outputs are not ranked; use n and choose yourself"
        raise ApiError(400, message, param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0; ask for at least 1, or echo the prompt", param="max_tokens")


async def _read(context: AppContext, prompt: str | list[int], add_special_tokens: bool) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(await context.texts.encode(prompt, add_special_tokens), prompt)
    return Prompt(check_token_ids(context, prompt))
