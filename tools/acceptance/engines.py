"""Whole engines: graphs against eager steps, modes against each other and one rank, and the time of a start."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from tools.acceptance.check import Result, Settings, at_most, equal, skipped
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.inference import InferenceEngine

PROMPT_LENGTHS = (3, 17, 64, 130)
TOKENS = 24
LOGPROB_TOLERANCE = 5e-3  # float32; kernels add in different orders
MOST_START = 1.3


class Answers(NamedTuple):
    """Chosen tokens, and the log-probabilities of the greedy ones, in the order of the prompts."""

    tokens: list[int]
    logprobs: list[float]


def engine_settings(settings: Settings, **changes: Any) -> dict[str, Any]:
    """A recipe of one engine on all ranks in float32, so that near ties are rare; changes: keys with dots as `__`."""
    chosen = {
        "model.dtype": "float32",
        "parallel.sp": settings.ranks,
        "runtime.device": settings.device.type,
        "runtime.log_level": "error",
        "policy.name": "static",
        "cache.num_blocks": 256,
        "scheduler.max_num_seqs": 16,
        "scheduler.max_num_batched_tokens": 256,
        "model.max_model_len": 512,
    }
    return chosen | {key.replace("__", "."): value for key, value in changes.items()}


def check_engines(settings: Settings) -> Iterator[Result]:
    """Tokens and log-probabilities of captured and eager steps, in every mode."""
    found = {name: answers(settings, enforce_eager) for name, enforce_eager in (("graphs", None), ("eager", True))}
    for mode in found["graphs"]:
        yield from _compare(f"graphs against eager, mode {mode}", found["graphs"][mode], found["eager"][mode])
    if settings.ranks == 1:
        yield skipped("both modes", "needs 2 GPUs")
        return
    first, *others = found["graphs"]
    for mode in others:
        yield from _compare(f"mode {first} against {mode}", found["graphs"][first], found["graphs"][mode])
    alone = answers(settings, None, parallel__sp=1)
    for mode, own in found["graphs"].items():
        yield from _compare(f"mode {mode} against one rank", own, next(iter(alone.values())))


def answers(settings: Settings, enforce_eager: bool | None, **changes: Any) -> dict[str, Answers]:
    """The answers of one engine in each of its modes, with greedy and seeded random sampling."""
    chosen = engine_settings(settings, runtime__enforce_eager=enforce_eager, **changes)
    with init_inference(str(settings.model), **chosen) as engine:
        modes = engine.config.parallel.available_modes
        found = {}
        for mode in modes:
            engine.set_policy("static", mode=list(mode))
            found[str(mode)] = _answers(engine)
        return found


def _answers(engine: InferenceEngine) -> Answers:
    prompts = [[(7 * index + 11 * n) % (engine.vocab_size - 3) + 1 for n in range(index)] for index in PROMPT_LENGTHS]
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1)
    tokens, logprobs = [], []
    for output in engine.generate(prompts, greedy):
        (sequence,) = output.outputs
        tokens += sequence.token_ids
        logprobs += [
            position[token].logprob for token, position in zip(tokens[-TOKENS:], sequence.logprobs or (), strict=True)
        ]
    for output in engine.generate(prompts, [_seeded(seed) for seed in range(len(prompts))]):
        tokens += output.outputs[0].token_ids
    return Answers(tokens, logprobs)


def _seeded(seed: int) -> SamplingParams:
    return SamplingParams(temperature=0.9, top_p=0.9, seed=seed, max_tokens=TOKENS, ignore_eos=True)


def _compare(check: str, own: Answers, other: Answers) -> Iterator[Result]:
    same = sum(a == b for a, b in zip(own.tokens, other.tokens, strict=True))
    yield equal(f"{check}: tokens", same, len(own.tokens))
    largest = max(abs(a - b) for a, b in zip(own.logprobs, other.logprobs, strict=True))
    yield at_most(f"{check}: log-probabilities", largest, LOGPROB_TOLERANCE)


def check_start(settings: Settings) -> Iterator[Result]:
    """Seconds of a start with both modes against one with a single mode, after a start that warmed everything up."""
    name = "start with both modes / with one"
    if settings.ranks == 1:
        yield skipped(name, "needs 2 GPUs")
        return
    if settings.device.type == "cpu":
        yield skipped(name, "a start on a CPU captures nothing")
        return
    start_seconds(settings, None)
    both, one = start_seconds(settings, None), start_seconds(settings, [])
    yield at_most(name, both / one, MOST_START)


def start_seconds(settings: Settings, modes: list[list[int]] | None) -> float:
    """Seconds of a start in bfloat16, with decode steps of up to 256 rows captured; modes: as parallel.modes."""
    chosen = engine_settings(
        settings, model__dtype="bfloat16", parallel__modes=modes, scheduler__max_num_seqs=256, cache__num_blocks=1024
    )
    started = time.perf_counter()
    with init_inference(str(settings.model), **chosen):
        return time.perf_counter() - started
