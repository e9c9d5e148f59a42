"""The `bench latency`, `throughput` and `rollouts` commands: every mode on one checkpoint in one run."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.bench.load import LoadMeter
from ulysses_infer.bench.random_model import random_model
from ulysses_infer.bench.report import as_json, comparison, median_makespan
from ulysses_infer.bench.single import SingleRank
from ulysses_infer.bench.step_sizes import savings, size_table, sizes_as_json, summed
from ulysses_infer.bench.workload import WARM_UP_TOKENS, Sample, Workload, measure
from ulysses_infer.config import Config
from ulysses_infer.console.banner import loaded, print_config, shown_path
from ulysses_infer.console.screen import make_console, mode_name
from ulysses_infer.engine.profile_key import device_name
from ulysses_infer.errors import ConfigError
from ulysses_infer.inference import InferenceEngine
from ulysses_infer.job.start_rank import choose_device

RunPrompts = Callable[[list[list[int]], Sequence[int]], Sample | None]
"""Runs (prompts, output lengths) in one mode; returns None on a rank that does not take part."""

MAX_FOREIGN_CORES = 0.1  # busy cores of other programs above which a warning is printed


def run(options: argparse.Namespace, config: Config, rank: int) -> None:
    """Measure on all ranks, print the table on rank 0. Collective. Raises one-line `UlyssesError`s."""
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
        meter = LoadMeter()
        samples = interleaved(runs, workload, options.repeats, engine.vocab_size, console)
        foreign = meter.foreign_cores()
    if rank == 0:
        labels = {mode: _label(mode, config) for mode in options.modes}
        _print(console, options, config, comparison(options.kind, samples, labels), foreign)
        if options.kind == "rollouts":
            print_switching(console, samples)
        if options.json is not None:
            _write(Path(options.json), options, config, samples, foreign)


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
    runs: dict[str, RunPrompts], workload: Workload, repeats: int, vocab_size: int, console: Console
) -> dict[str, list[Sample]]:
    """Warm up every mode, then alternate the modes (A B C, A B C, ...), so that disturbances affect all of them."""
    samples: dict[str, list[Sample]] = {mode: [] for mode in runs}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("warming up", total=len(runs) * (repeats + 1))
        for repeat in range(-1, repeats):
            lengths = workload.output_lens(repeat) if repeat >= 0 else [WARM_UP_TOKENS] * workload.num_requests
            for mode, run_mode in runs.items():
                bar.update(task, description=f"{'warming up' if repeat < 0 else 'measuring'} {mode}")
                sample = run_mode(workload.prompts(repeat, vocab_size, mode), lengths)
                if repeat >= 0 and sample is not None:
                    samples[mode].append(sample)
                bar.advance(task)
    return samples


def _run_of(mode: str, engine: InferenceEngine, config: Config, rank: int, stack: ExitStack) -> RunPrompts:
    """The function that measures one mode on this rank."""
    if mode == "single":
        if config.parallel.world_size == 1:
            return lambda prompts, output_lens: measure(engine, prompts, output_lens)
        if rank > 0:
            return lambda prompts, output_lens: None
        return stack.enter_context(SingleRank(config, _all_threads(config))).run
    policy: dict[str, Any] = {"name": "static", "mode": mode}
    if mode == "shift":
        policy = {"name": "threshold", "threshold_tokens": config.policy.threshold_tokens}
    if mode == "adaptive":
        policy = {"name": "adaptive"}

    def run_mode(prompts: list[list[int]], output_lens: Sequence[int]) -> Sample:
        engine.set_policy(**policy)
        return measure(engine, prompts, output_lens)

    return run_mode


def _all_threads(config: Config) -> int:
    """The threads of all ranks together, for the engine on a single rank."""
    return torch.get_num_threads() * config.parallel.world_size


def _label(mode: str, config: Config) -> str:
    layout = config.parallel.layout
    labels = {
        "sp": f"sp      {mode_name(layout.base)}",
        "tp": f"tp      {mode_name(layout.shift)}",
        "shift": f"shift   {mode_name(layout.base)} > {config.policy.threshold_tokens} tokens",
        "adaptive": "adaptive",
        "single": f"single  1 rank, {_threads(_all_threads(config))}",
    }
    return labels[mode]


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _print(console: Console, options: Any, config: Config, table: Any, foreign: float) -> None:
    console.print(
        f"{options.kind}: {_requests(options)}, {options.input_len} tokens in, {options.output_len} out"
        f"{' (median)' if options.tail else ''}, medians of {options.repeats}, {config.parallel.world_size} x "
        f"{_threads(torch.get_num_threads())}, {'' if options.samples > 1 else 'no '}prefix caching; "
        f"{device_name(choose_device(config.runtime.device))}\n"
    )
    console.print(table)
    if foreign > MAX_FOREIGN_CORES:
        console.print(f"\n  other programs kept {foreign:.1f} cores busy: small differences are not reliable")


def print_switching(console: Console, samples: Mapping[str, Sequence[Sample]]) -> None:
    """What the steps of each size took in both static modes, and what switching can gain; nothing without both."""
    if not {"tp", "sp"} <= samples.keys():
        return
    steps = {mode: summed(sample.steps for sample in own) for mode, own in samples.items()}
    best = min(("tp", "sp"), key=lambda mode: median_makespan(samples[mode]))
    other = "sp" if best == "tp" else "tp"
    seconds, num_runs = median_makespan(samples[best]), len(samples[best])
    least = seconds - savings(steps[best], steps[other]) / num_runs
    console.print("")
    console.print(size_table(steps["tp"], steps["sp"], num_runs))
    console.print(
        f"\n  best static mode: {best}, {seconds:.2f} s; with the faster mode for steps of every size: {least:.2f} s, "
        f"{least / seconds:.3f}x"
    )
    for mode in ("shift", "adaptive"):
        if mode in samples:
            console.print(f"  {mode}: {median_makespan(samples[mode]) / seconds:.3f}x of the best static mode")


def _requests(options: Any) -> str:
    if options.samples > 1:
        return f"{options.num_prompts} prompts x {options.samples} samples at once"
    return f"{options.num_prompts} concurrent requests" if options.num_prompts > 1 else "a single request"


def _write(path: Path, options: Any, config: Config, samples: Mapping[str, Sequence[Sample]], foreign: float) -> None:
    record = {
        "benchmark": options.kind,
        "model": shown_path(config.model.path),
        "input_len": options.input_len,
        "output_len": options.output_len,
        "num_prompts": options.num_prompts,
        "samples": options.samples,
        "tail": options.tail,
        "repeats": options.repeats,
        "sp": config.parallel.sp,
        "tp": config.parallel.tp,
        "threshold_tokens": config.policy.threshold_tokens,
        "threads_per_rank": torch.get_num_threads(),
        "foreign_busy_cores": foreign,
        "device": device_name(choose_device(config.runtime.device)),
        "modes": as_json(options.kind, samples),
        "steps": sizes_as_json({mode: [sample.steps for sample in own] for mode, own in samples.items()}),
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
