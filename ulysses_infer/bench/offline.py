"""The `bench latency`, `throughput` and `rollouts` commands: every mode on one checkpoint in one run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.bench.fitting import fitted, probe
from ulysses_infer.bench.random_model import random_model
from ulysses_infer.bench.results import WARM_UP, Results, all_threads, sizes_in_words
from ulysses_infer.bench.single import SingleRank
from ulysses_infer.bench.workload import WARM_UP_TOKENS, RunPrompts, Sample, Workload, measure
from ulysses_infer.config import Config
from ulysses_infer.console.banner import loaded, print_config
from ulysses_infer.console.screen import make_console
from ulysses_infer.errors import ConfigError
from ulysses_infer.inference import InferenceEngine
from ulysses_infer.job.lifetime import Guard

STATIC = ("tp", "sp")


def run(options: argparse.Namespace, config: Config, rank: int, guard: Guard | None = None) -> None:
    """Measure on all ranks, print the table on rank 0. Collective. Raises one-line `UlyssesError`s.

    guard: a signal that it takes shows what is measured by then.
    """
    console = make_console(rank)
    check_modes(options.modes, config)
    check_json(options.json)
    if options.random_model is not None:
        config.model.path = str(random_model(options.random_model))
    seed = config.model.seed or 0
    sizes = (options.input_len, options.output_len, options.num_prompts)
    workload = Workload(*sizes, seed, options.samples, options.tail)
    config = for_benchmark(config, workload)
    print_config(console, f"bench {options.kind}", config)
    with loaded(config, console) as engine, ExitStack() as stack:
        runs = {mode: _run_of(mode, engine, config, rank, stack) for mode in options.modes}
        file = Path(options.json) if options.json is not None and rank == 0 else None
        results = Results(options, config, workload, console, file)
        if guard is not None and rank == 0:
            guard.before_end(results.show_stopped)
        if options.seconds is not None:
            results.workload = in_time(workload, runs, options, config, engine.vocab_size, console)
        interleaved(runs, options.repeats, engine.vocab_size, results, options.seconds)
    results.show()


def in_time(
    workload: Workload, runs: Mapping[str, RunPrompts], options: Any, config: Config, vocab_size: int, console: Console
) -> Workload:
    """`workload`, or a smaller one, so that all runs take about `options.seconds` seconds. The same on all ranks."""
    console.print(f"  probing, to fit all runs into {options.seconds:g} s", style="dim")
    own = [mode for mode in runs if mode != "single"] or list(runs)
    probed = [mode for mode in own if mode in STATIC] or own[:1]
    paces = [pace for mode in probed if (pace := probe(runs[mode], workload, vocab_size, mode)) is not None]
    seconds = options.seconds - config.policy.calibration_seconds * ("adaptive" in runs)
    found = fitted(workload, paces, len(runs), options.repeats, seconds)
    if found != workload:
        console.print(f"  {sizes_in_words(workload)}: too much for that time")
    console.print(f"  {sizes_in_words(found)}\n")
    return found


def check_modes(modes: list[str], config: Config) -> None:
    """Raise `ConfigError` if a mode needs more ranks than there are."""
    parallel_modes = [mode for mode in modes if mode != "single"]
    if config.parallel.world_size == 1 and parallel_modes:
        raise ConfigError(
            f"mode {parallel_modes[0]} needs more than one rank; add parallel.sp=2 (or more), or measure --modes single"
        )


def check_json(path: str | None) -> None:
    """Raise `ConfigError` if the measurements could not be written after the run."""
    if path is not None and not Path(path).parent.is_dir():
        raise ConfigError(f"--json {path!r}: folder '{Path(path).parent}' does not exist; create it")


def for_benchmark(config: Config, workload: Workload) -> Config:
    """`config` with a cache just large enough for the workload. Without prefix caching, so that modes are independent,
    unless the requests of a run share prompts."""
    cache = dataclasses.replace(config.cache, enable_prefix_caching=workload.samples > 1)
    model = dataclasses.replace(config.model)
    if cache.num_blocks is None and cache.memory_bytes is None:
        model.max_model_len = model.max_model_len or workload.input_len + workload.longest_output
        longest = ceil_div(model.max_model_len, cache.block_size)
        cache.num_blocks = max(workload.num_blocks(cache.block_size), longest)
    return dataclasses.replace(config, cache=cache, model=model)


def interleaved(
    runs: Mapping[str, RunPrompts], repeats: int, vocab_size: int, results: Results, seconds: float | None = None
) -> None:
    """Warm up every mode, then alternate the modes (A B C, A B C, ...), so that disturbances affect all of them.

    seconds: after the first repeat no other begins that would exceed this time.
    """
    workload, spent = results.workload, 0.0
    with results:
        for repeat in range(WARM_UP, repeats):
            lengths = workload.output_lens(repeat) if repeat != WARM_UP else [WARM_UP_TOKENS] * workload.num_requests
            slowest = 0.0
            for mode, run_mode in runs.items():
                results.begin(mode, repeat)
                sample = run_mode(workload.prompts(repeat, vocab_size, mode), lengths)
                if sample is not None:
                    results.add(mode, repeat, sample)
                if sample is not None and (mode != "single" or len(runs) == 1):  # what all ranks know
                    slowest = max(slowest, sample.seconds)
            spent += slowest * len(runs)
            if repeat != WARM_UP and seconds is not None and spent + slowest * len(runs) > seconds:
                break


def _run_of(mode: str, engine: InferenceEngine, config: Config, rank: int, stack: ExitStack) -> RunPrompts:
    """The function that measures one mode on this rank."""
    if mode == "single":
        if config.parallel.world_size == 1:
            return lambda prompts, output_lens: measure(engine, prompts, output_lens)
        if rank > 0:
            return lambda prompts, output_lens: None
        return stack.enter_context(SingleRank(config, all_threads(config))).run
    policy: dict[str, Any] = {"name": "static", "mode": mode}
    if mode == "shift":
        policy = {"name": "threshold", "threshold_tokens": config.policy.threshold_tokens}
    if mode == "adaptive":
        policy = {"name": "adaptive"}

    def run_mode(prompts: list[list[int]], output_lens: Sequence[int]) -> Sample:
        engine.set_policy(**policy)
        return measure(engine, prompts, output_lens)

    return run_mode
