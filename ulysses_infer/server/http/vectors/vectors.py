"""Vectors of prompts, and scores of pairs of texts: requests that compute prompts only."""

from __future__ import annotations

import array
import asyncio
import base64
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from ulysses_infer.outputs import normalized
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.disconnect import until_disconnect
from ulysses_infer.server.http.errors import ApiError, timeout_error
from ulysses_infer.server.http.generation import Generation, Prompt, generate, truncated
from ulysses_infer.server.http.openai.completions import check_token_ids
from ulysses_infer.server.http.protocol.vectors import PromptFields, RerankRequest, ScoreRequest, VectorRequest
from ulysses_infer.server.messages import NewToken

NUM_TOKENS = 1
"""The engine always samples a token after a prompt."""


@dataclass(frozen=True)
class Computed:
    """What the engine has computed of some prompts."""

    id: str
    model: str
    prompts: list[Prompt]
    tokens: list[NewToken]
    """The first token after each prompt, with what was asked for."""

    @property
    def head(self) -> dict[str, Any]:
        """The first fields of an answer."""
        return {"id": self.id, "object": "list", "created": int(time.time()), "model": self.model}

    @property
    def usage(self) -> dict[str, int]:
        """Token counts."""
        count = sum(len(prompt.token_ids) for prompt in self.prompts)
        return {"prompt_tokens": count, "total_tokens": count}

    @property
    def vectors(self) -> list[list[float]]:
        """The vector of each prompt."""
        return [(token.start.pooled if token.start is not None else None) or [] for token in self.tokens]


async def compute(
    request: Request, context: AppContext, body: PromptFields, prompts: Sequence[str | list[int]], **params: Any
) -> Computed:
    """Run prompts while the client is connected. params: of `SamplingParams`. Raises `ApiError`, `RequestError`,
    `OverloadedError` or `EngineDeadError`."""
    model = context.choose_model(body.model)
    context.engine_info()
    read = [await _read(context, body, prompt) for prompt in prompts]
    wanted = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, detokenize=False, **params)
    name = f"pool-{body.request_id or uuid.uuid4().hex}"
    adapter = context.adapter_of(model)
    generation = Generation(name, read, wanted, body.priority or 0, body.cache_salt or "", adapter)
    timeout = context.config.server.request_timeout
    try:
        async with asyncio.timeout(timeout):
            tokens = await until_disconnect(request.receive, _first_tokens(context, generation))
    except TimeoutError:
        raise timeout_error(timeout or 0) from None
    return Computed(name, model, read, tokens)


async def _read(context: AppContext, body: PromptFields, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, str):
        token_ids = await context.texts.encode(prompt, body.add_special_tokens is not False)
    else:
        token_ids = check_token_ids(context, prompt)
    longest = context.engine_info().max_model_len
    return Prompt(truncated(token_ids, body.truncate_prompt_tokens, longest, NUM_TOKENS))


async def _first_tokens(context: AppContext, generation: Generation) -> list[NewToken]:
    found: dict[int, NewToken] = {}
    with context.registered(generation.id, generation.request_ids):
        async with aclosing(generate(context.client, generation)) as batches:
            async for position, batch in batches:
                for token in batch:
                    if token.finish_reason in ("error", "abort"):
                        reason = token.stop_reason or token.finish_reason
                        message = f"the engine could not compute input {position}: {reason}"
                        raise ApiError(500, message, "internal_error", code="request_failed")
                    found.setdefault(position, token)
    return [found[position] for position in range(len(generation.prompts))]


# -- vectors -----------------------------------------------------------------------------------------------------------


async def vectors(
    request: Request, context: AppContext, body: VectorRequest, normalizes: bool
) -> tuple[Computed, list[list[float] | str]]:
    """The vector of each input, as the request wants them. normalizes: unless it says otherwise."""
    done = await compute(request, context, body, body.input, pooling=body.pooling or context.pooling)
    size = len(done.vectors[0])
    if body.dimensions is not None and body.dimensions > size:
        raise ApiError(400, f"dimensions is {body.dimensions}; the vectors have {size}", param="dimensions")
    shortened = [vector[: body.dimensions] for vector in done.vectors]
    if normalizes if body.normalize is None else body.normalize:
        shortened = [normalized(vector) for vector in shortened]
    as_text = body.encoding_format == "base64"
    return done, [_base64(vector) if as_text else vector for vector in shortened]


def _base64(vector: list[float]) -> str:
    values = array.array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()


# -- scores ------------------------------------------------------------------------------------------------------------


async def score_pairs(request: Request, context: AppContext, body: ScoreRequest) -> tuple[Computed, list[float]]:
    """The score of each pair of texts."""
    first = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    if len(first) not in (1, len(second)):
        message = f"text_1 has {len(first)} texts and text_2 {len(second)}; give one query, or one per text"
        raise ApiError(400, message, param="text_1")
    queries = first * len(second) if len(first) == 1 else first
    return await _scores(request, context, body, queries, second, body.instruction)


async def rank_documents(request: Request, context: AppContext, body: RerankRequest) -> tuple[Computed, list[float]]:
    """The score of each document."""
    documents = [item if isinstance(item, str) else item.text for item in body.documents]
    return await _scores(request, context, body, [body.query] * len(documents), documents, body.instruction)


async def _scores(
    request: Request,
    context: AppContext,
    body: PromptFields,
    queries: Sequence[str],
    documents: Sequence[str],
    instruction: str | None,
) -> tuple[Computed, list[float]]:
    """By the tokens that the model judges a pair with, else by the cosine of their vectors."""
    judge = context.judge
    if judge is not None:
        pairs = zip(queries, documents, strict=True)
        prompts = [judge.prompt(query, document, instruction) for query, document in pairs]
        tokens = list(judge.token_ids)
        done = await compute(request, context, body, prompts, logprobs=0, logprob_token_ids=tokens)
        return done, [judge.score(token.logprobs or []) for token in done.tokens]
    distinct = list(dict.fromkeys([*queries, *documents]))
    done = await compute(request, context, body, distinct, pooling=context.pooling)
    vectors = dict(zip(distinct, map(normalized, done.vectors), strict=True))
    return done, [_dot(vectors[query], vectors[text]) for query, text in zip(queries, documents, strict=True)]


def _dot(first: list[float], second: list[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))
