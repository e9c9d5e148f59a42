"""/inference/v1/generate: token ids in, token ids out."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from ulysses_infer.errors import RequestError
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.generation import Generation, Prompt
from ulysses_infer.server.http.openai.completions import check_token_ids
from ulysses_infer.server.http.openai.logprobs import TokenNames, chat_logprob, prompt_logprobs
from ulysses_infer.server.http.outputs import Delta, Output, Outputs
from ulysses_infer.server.http.protocol.generate import GenerateRequest
from ulysses_infer.server.http.respond import PreparedRequest
from ulysses_infer.server.http.sse import DONE, event


class TokenWriter:
    """Writes the outputs as token ids."""

    def __init__(self, context: AppContext, body: GenerateRequest, generation: Generation, outputs: Outputs) -> None:
        self._context, self._generation, self._outputs = context, generation, outputs
        self._names = TokenNames(context.texts, as_ids=True)
        self._has_usage = bool(body.stream_options and body.stream_options.include_usage)

    def whole(self) -> dict[str, Any]:
        """The whole response."""
        choices = [self._choice(output, output.flush()) for output in self._outputs.all]
        start = self._outputs.sources[0].start
        scored = None if start is None else start.prompt_logprobs
        prompt = None if scored is None else prompt_logprobs(self._context.texts, scored)
        return {**self._head(choices), "prompt_logprobs": prompt, "usage": self._outputs.usage()}

    def events(self, touched: Sequence[Output]) -> bytes:
        """One event with the new tokens of all outputs in `touched`."""
        choices = [self._choice(output, output.flush()) for output in touched]
        return event(self._head(choices))

    def last_events(self) -> bytes:
        """The usage, if requested, and the end."""
        return (event({**self._head([]), "usage": self._outputs.usage()}) if self._has_usage else b"") + DONE

    def failure(self, error: ApiError) -> bytes:
        """The error, and the end."""
        return event(error.body) + DONE

    def _head(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"request_id": self._generation.id, "choices": choices, "prompt_logprobs": None}

    def _choice(self, output: Output, delta: Delta) -> dict[str, Any]:
        num_top = self._generation.params.logprobs
        logprobs = None
        if num_top is not None:
            scored = [chat_logprob(self._names, token.logprobs, num_top) for token in delta.tokens if token.logprobs]
            logprobs = {"content": scored, "refusal": None}
        return {
            "index": output.index,
            "token_ids": delta.token_ids,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "weight_versions": output.weight_versions,
        }


def prepare_tokens(context: AppContext, body: GenerateRequest) -> PreparedRequest[TokenWriter]:
    """Check a request. Raises `ApiError`, `OverloadedError`, `EngineDeadError`."""
    model = context.choose_model(body.model)
    token_ids = check_token_ids(context, body.token_ids)
    try:
        params = SamplingParams.from_mapping({**context.sampling_defaults, **body.sampling_params})
    except RequestError as error:
        raise ApiError(400, f"sampling_params: {error}", param="sampling_params") from None
    adapter = context.adapter_of(model)
    generation = Generation(
        body.request_id or f"gen-{uuid.uuid4().hex}",
        [Prompt(token_ids)],
        params,
        body.priority or 0,
        body.cache_salt or "",
        adapter,
    )
    return PreparedRequest(
        generation, bool(body.stream), lambda outputs: TokenWriter(context, body, generation, outputs)
    )
