"""A running server as the engine of a trainer: token ids out and in, and new weights."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ulysses_infer.errors import ConfigError, RequestError, kind_and_line
from ulysses_infer.extras import require_extra
from ulysses_infer.outputs import CompletionOutput, Logprob
from ulysses_infer.rl.weight_sender import WeightSender
from ulysses_infer.sampling_params import SamplingParams

MAX_CONNECTIONS = 256
MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Parameters for which a server would otherwise take the model's recommendation."""


class RemoteEngine:
    """The server at `url`, which the process that makes it sends weights to.

    port: of this process, for the ranks of the server. Raises `ConfigError` without an administrator's key, and
    `RequestError` if the server refuses or cannot be reached.
    """

    def __init__(self, url: str, admin_api_key: str | None, port: int, device: torch.device | str) -> None:
        require_extra("generating on a server", "trl", "httpx")
        if admin_api_key is None:
            raise ConfigError("admin_api_key is missing; give the server.admin_api_key of the server")
        self._url, self._key = url.rstrip("/"), admin_api_key
        self._sender = WeightSender(url, admin_api_key, port, device=device)

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights of the server."""
        self._sender.send(named_tensors)

    def generate(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[CompletionOutput]:
        """One completion per prompt, all at the same time. Raises `RequestError`."""
        return asyncio.run(self._generate(prompts, params))

    async def _generate(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[CompletionOutput]:
        import httpx

        limits = httpx.Limits(max_connections=MAX_CONNECTIONS)
        headers = {"Authorization": f"Bearer {self._key}"}
        try:
            async with httpx.AsyncClient(base_url=self._url, headers=headers, limits=limits, timeout=None) as client:
                work = zip(prompts, params, strict=True)
                return await asyncio.gather(*(_complete(client, prompt, each) for prompt, each in work))
        except httpx.HTTPError as error:
            raise RequestError(f"{self._url} cannot be reached: {kind_and_line(error)}") from error


async def _complete(client: Any, prompt: list[int], params: SamplingParams) -> CompletionOutput:
    output, _ = await complete(client, prompt, params)
    if output.finish_reason not in ("stop", "length"):
        raise RequestError(f"a rollout ended with {output.finish_reason!r} ({output.stop_reason})")
    return output


async def complete(
    client: Any, prompt: list[int], params: SamplingParams, request_id: str | None = None
) -> tuple[CompletionOutput, list[str]]:
    """One completion from a server, and the versions of the weights that computed it, in order.

    client: httpx's, for the server. request_id: by which the request can be aborted. Raises `RequestError` if the
    server refuses.
    """
    explicit = {name: getattr(params, name) for name in MODEL_DEFAULTS}
    body = {"token_ids": prompt, "sampling_params": {**explicit, **params.to_mapping()}}
    named = {} if request_id is None else {"request_id": request_id}
    answer = await client.post("/inference/v1/generate", json={**body, **named})
    if answer.status_code != 200:
        raise RequestError(f"/inference/v1/generate: {answer.json()['error']['message']}")
    (choice,) = answer.json()["choices"]
    logprobs = None if choice["logprobs"] is None else [_entry(each) for each in choice["logprobs"]["content"]]
    finish, stop = choice["finish_reason"], choice["stop_reason"]
    output = CompletionOutput(0, "", choice["token_ids"], logprobs=logprobs, finish_reason=finish, stop_reason=stop)
    return output, choice["weight_versions"]


def _entry(scored: dict[str, Any]) -> dict[int, Logprob]:
    """The token's own log-probability and those of the likeliest, by token."""
    ranked = {_token(each): Logprob(each["logprob"], rank) for rank, each in enumerate(scored["top_logprobs"], start=1)}
    own = _token(scored)
    return {own: ranked.get(own, Logprob(scored["logprob"], len(ranked) + 1)), **ranked}


def _token(scored: dict[str, Any]) -> int:
    return int(scored["token"].removeprefix("token_id:"))
