"""Time per output token against other programs, on one device and the same checkpoint."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import torch

from tools.acceptance.check import Result, Settings, at_least, measured, skipped
from tools.acceptance.engines import engine_settings
from tools.acceptance.speed import wait
from ulysses_infer import SamplingParams, init_inference

PROMPT_TOKENS = 64
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}


def check_peers(settings: Settings) -> Iterator[Result]:
    """Their time per token divided by ours, of a lone request."""
    tokens = 16 if settings.quick else 128
    own = own_seconds(settings, tokens)
    yield measured("time per output token", own * 1e3, "ms")
    theirs = transformers_seconds(settings, tokens)
    yield at_least("time of transformers / ours", theirs / own, 1.0, settings.has_targets)
    if settings.device.type == "cpu" or importlib.util.find_spec("vllm") is None:
        yield skipped("time of vLLM / ours", "vLLM is not installed, or this is a CPU")
        return
    yield measured("time of vLLM / ours", vllm_seconds(settings, tokens) / own, "")


def _per_token(run: Any, tokens: int) -> float:
    """Seconds per token after the first: `run(n)` generates n tokens, once before to warm up."""
    run(tokens)
    times = {}
    for count in (1, tokens):
        started = time.perf_counter()
        run(count)
        times[count] = time.perf_counter() - started
    return float(times[tokens] - times[1]) / (tokens - 1)


def own_seconds(settings: Settings, tokens: int) -> float:
    """Of this engine, on one rank."""
    chosen = engine_settings(settings, model__dtype=DTYPES[settings.device.type], parallel__sp=1)
    with init_inference(str(settings.model), **chosen) as engine:

        def run(count: int) -> None:
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            engine.generate([list(range(1, PROMPT_TOKENS + 1))], params)

        return _per_token(run, tokens)


def transformers_seconds(settings: Settings, tokens: int) -> float:
    """Of transformers' `generate`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    dtype = getattr(torch, DTYPES[settings.device.type])
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, device_map=settings.device)
    prompt = torch.arange(1, PROMPT_TOKENS + 1, device=settings.device)[None]
    mask = torch.ones_like(prompt)

    def run(count: int) -> None:
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        with torch.inference_mode():
            model.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
        wait(settings.device)

    return _per_token(run, tokens)


def vllm_seconds(settings: Settings, tokens: int) -> float:
    """Of vLLM's offline interface."""
    import vllm

    llm = vllm.LLM(str(settings.model), dtype="bfloat16", gpu_memory_utilization=0.5, max_model_len=512)

    def run(count: int) -> None:
        params = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        llm.generate([{"prompt_token_ids": list(range(1, PROMPT_TOKENS + 1))}], params, use_tqdm=False)

    return _per_token(run, tokens)
