"""/v1/completions: prompts to engine requests, outputs to choices."""

from __future__ import annotations

from typing import Any

from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.generation import Prompt, truncated
from ulysses_infer.server.http.openai.choices import ChoiceKind, ChoiceWriter, prepared_choices
from ulysses_infer.server.http.openai.logprobs import LegacyLogprobs, TokenNames, prompt_logprobs
from ulysses_infer.server.http.outputs import Delta, Output
from ulysses_infer.server.http.protocol.completions import CompletionRequest
from ulysses_infer.server.http.respond import PreparedRequest, check_streaming, generation_of
from ulysses_infer.server.http.sampling import sampling_params, structured_outputs


class CompletionChoiceBuilder:
    """Builds one output: whole, or the next chunk of it."""

    num_reasoning_tokens = None

    def __init__(self, context: AppContext, body: CompletionRequest, output: Output, params: SamplingParams) -> None:
        self._texts, self._body, self._output = context.texts, body, output
        self._is_first = True
        self._logprobs = None
        if body.logprobs is not None:
            names = TokenNames(context.texts, bool(body.return_tokens_as_token_ids))
            before = () if body.echo else output.source.prompt.token_ids
            self._logprobs = LegacyLogprobs(context.texts, names, params.skip_special_tokens, before)

    def whole(self) -> dict[str, Any]:
        """The choice of a whole response."""
        return self._write(self._output.flush())

    def chunks(self) -> list[dict[str, Any]]:
        """The choice of the next chunk, unless it would be empty."""
        delta = self._output.flush()
        says_tokens = self._logprobs is not None or bool(self._body.return_token_ids)
        is_worth_it = delta.text or delta.finish_reason or self._is_first or (says_tokens and delta.tokens)
        return [self._write(delta)] if is_worth_it else []

    def _write(self, delta: Delta) -> dict[str, Any]:
        """The choice with what is new since the last call, after the prompt if it is echoed."""
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
        if self._output.weight_versions and delta.finish_reason is not None:
            choice["weight_versions"] = self._output.weight_versions
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


async def prepare_completion(context: AppContext, body: CompletionRequest) -> PreparedRequest[ChoiceWriter]:
    """Check a request and encode its prompts. Raises `ApiError`, `RequestError`, `OverloadedError` or
    `EngineDeadError`."""
    context.choose_model(body.model)
    _check(body)
    changes: dict[str, Any] = {"logprobs": body.logprobs, "structured_outputs": structured_outputs(body)}
    if body.max_tokens is None and context.config.server.default_max_tokens is not None:
        changes["max_tokens"] = None  # the default of /v1/completions is not that of `sampling_defaults`
    if body.max_tokens == 0:
        changes |= {"max_tokens": 1, "min_tokens": 0}  # the engine always samples a token after a prompt
    if body.echo and body.logprobs is not None:
        changes["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    params = sampling_params(body, context.sampling_defaults, **changes)
    context.engine_info()
    prompts = [await _read(context, prompt, body, params.max_tokens) for prompt in body.prompt]
    generation = generation_of(context, "cmpl-", body, prompts, params)
    kind = ChoiceKind(
        "text_completion", "text_completion", lambda output: CompletionChoiceBuilder(context, body, output, params)
    )
    return prepared_choices(context, body, generation, kind, keeps_tokens=body.max_tokens != 0)


def check_token_ids(context: AppContext, token_ids: list[int]) -> list[int]:
    """Checks that token ids are in the vocabulary. Raises `ApiError`."""
    vocab_size = context.engine_info().vocab_size
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        message = f"token id {largest} is outside the vocabulary; use 0 to {vocab_size - 1}"
        raise ApiError(400, message, param="prompt")
    return token_ids


def _check(body: CompletionRequest) -> None:
    check_streaming(body)
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0; ask for at least 1, or echo the prompt", param="max_tokens")


async def _read(
    context: AppContext, prompt: str | list[int], body: CompletionRequest, max_tokens: int | None
) -> Prompt:
    if isinstance(prompt, str):
        token_ids = await context.texts.encode(prompt, body.add_special_tokens is not False)
    else:
        token_ids = check_token_ids(context, prompt)
    limit, max_model_len = body.truncate_prompt_tokens, context.engine_info().max_model_len
    kept = truncated(token_ids, limit, max_model_len, max_tokens)
    return Prompt(kept, prompt if isinstance(prompt, str) and len(kept) == len(token_ids) else None)
