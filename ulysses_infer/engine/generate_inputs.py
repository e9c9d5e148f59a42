"""Normalises the arguments of `generate` and `stream` to one set per prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ulysses_infer.errors import RequestError
from ulysses_infer.sampling_params import SamplingParams


class GenerateInput(NamedTuple):
    """One prompt and how to complete it."""

    prompt: Any
    params: SamplingParams
    adapter: str | None


def generate_inputs(
    prompts: Any, sampling_params: Any, adapter: Any, defaults: Mapping[str, Any]
) -> list[GenerateInput]:
    """The arguments of `generate` as one item per prompt. defaults: the values of sampling parameters that are not
    given at all. Raises `RequestError`."""
    listed = as_prompts(prompts)
    params = params_for(listed, sampling_params, defaults)
    return [GenerateInput(*parts) for parts in zip(listed, params, _adapters_for(listed, adapter), strict=True)]


def _adapters_for(prompts: list[Any], adapter: Any) -> list[str | None]:
    if not isinstance(adapter, list | tuple):
        return [adapter] * len(prompts)
    if len(adapter) != len(prompts):
        raise RequestError(f"{len(adapter)} adapters for {len(prompts)} prompts; give one for all, or one each")
    return list(adapter)


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt or many, as a list of prompts."""
    single = isinstance(prompts, str) or not isinstance(prompts, list | tuple)
    if single or (prompts and all(isinstance(part, int | dict) for part in prompts)):
        return [prompts]
    return list(prompts)


def params_for(prompts: list[Any], sampling_params: Any, defaults: Mapping[str, Any]) -> list[SamplingParams]:
    """One set of sampling parameters per prompt, from one for all or a list. Raises `RequestError`."""
    if not isinstance(sampling_params, list | tuple):
        return [as_params(sampling_params, defaults)] * len(prompts)
    if len(sampling_params) != len(prompts):
        raise RequestError(
            f"{len(sampling_params)} sampling params for {len(prompts)} prompts; give one for all, or one each"
        )
    return [as_params(params, defaults) for params in sampling_params]


def as_params(given: Any, defaults: Mapping[str, Any]) -> SamplingParams:
    """The sampling parameters of one prompt, or the model's `defaults`. Raises `RequestError`."""
    if given is None:
        return SamplingParams(**defaults)
    if not isinstance(given, SamplingParams):
        raise RequestError(f"sampling parameters are a SamplingParams, not a {type(given).__name__}")
    return given


def arrivals_for(prompts: Sequence[Any], arrival_steps: Sequence[int] | None) -> list[int]:
    """The step at which each prompt arrives, 0 by default. Raises `RequestError`."""
    if arrival_steps is None:
        return [0] * len(prompts)
    if len(arrival_steps) != len(prompts):
        raise RequestError(f"{len(arrival_steps)} arrival steps for {len(prompts)} prompts; give one each")
    return list(arrival_steps)
