"""The `plan` command, and `ulysses_infer.plan` for Python."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ulysses_infer.bench.replay.replay_options import scale_of, window_of
from ulysses_infer.bench.replay.scaling import thinned
from ulysses_infer.bench.serve.traces import HASH_BLOCK_TOKENS, TraceRow, read_trace
from ulysses_infer.config import CacheConfig, Config, ModelConfig, ParallelConfig, SchedulerConfig
from ulysses_infer.errors import ConfigError
from ulysses_infer.model.injection.architectures import check_supported
from ulysses_infer.planning.node import load_node
from ulysses_infer.planning.operations import Changes
from ulysses_infer.planning.planner import Plan, Planner
from ulysses_infer.planning.recipe import recipe_of, write_recipe
from ulysses_infer.planning.sizes import ModelSizes, sizes_of
from ulysses_infer.planning.speculation import parse_speculation
from ulysses_infer.planning.step_times import AnalyticStepTimes
from ulysses_infer.planning.table import print_explanation, print_plan
from ulysses_infer.planning.workload import Traffic, simulated_block_size
from ulysses_infer.step_time.profile import Profile
from ulysses_infer.worker.memory import freeze_gc, relax_gc

DEFAULT_REQUESTS = 512
BURSTINESS = 0.25
LEAST_WIDTH = 260  # columns: a narrower terminal breaks lines, which is better than figures that are cut off


def run(options: argparse.Namespace) -> int:
    """Plan, print, write what was asked for. Returns the exit status. Raises `UlyssesError`s of one line."""
    console = Console(soft_wrap=True)
    console.width = max(console.width, LEAST_WIDTH)
    _check_outputs(options)
    freeze_gc()  # the objects of imports stay
    relax_gc()  # and those of a step soon go
    rows = _rows(options)
    planner = _planner(options, options.block_size or simulated_block_size(rows))
    if options.explain is not None:
        _explain(console, planner, options.explain)
        return 0
    plan = _with_progress(planner, rows, dict(options.slo))
    print_plan(console, plan, options.price, options.max_num_seqs)
    _write(console, planner, plan, options)
    return 0


def plan(
    model: Any,
    hardware: str,
    requests: Sequence[TraceRow] | Traffic,
    targets: Mapping[str, float] | None = None,
    dtype: str | None = None,
    num_nodes: int = 1,
    changes: Changes | None = None,
    speculation: str | None = None,
    offload_host_bytes: int = 0,
    offload_disk_bytes: int = 0,
    allow_unverified: bool = False,
    **scheduler: int,
) -> Plan:
    """Predict every layout of `model` on `hardware` for these requests; the best is first in `Plan.evaluations`.

    model: a folder or config.json, or a transformers config. hardware: a name as 8xh200, or a YAML file. targets:
    limits in ms of ttft, tpot or latency. speculation: as `ngram:acceptance=0.6,num_tokens=4`. offload_host_bytes,
    offload_disk_bytes: of the tier below the cache, per rank. allow_unverified: plan a model type that has not been
    verified, too. scheduler: max_num_seqs, max_num_batched_tokens. Raises `ConfigError`, `UnsupportedModelError`.
    """
    rows, config = requests.rows() if isinstance(requests, Traffic) else requests, _config(**scheduler)
    config.cache.block_size = simulated_block_size(rows)
    config.cache.offload_host_bytes, config.cache.offload_disk_bytes = offload_host_bytes, offload_disk_bytes
    drafts = None if speculation is None else parse_speculation(speculation)
    planner = Planner(
        _sizes(model, dtype, allow_unverified), load_node(hardware), config, num_nodes, changes, speculation=drafts
    )
    return planner.plan(rows, targets or {})


def _planner(options: argparse.Namespace, block_size: int) -> Planner:
    config = _config(max_num_seqs=options.max_num_seqs, max_num_batched_tokens=options.max_num_batched_tokens)
    config.model.path, config.model.max_model_len = options.model, options.max_model_len
    config.model.allow_unverified = options.allow_unverified
    config.cache.dtype, config.cache.block_size = options.cache_dtype, block_size
    config.cache.offload_host_bytes = options.offload_host_bytes
    config.cache.offload_disk_bytes = options.offload_disk_bytes
    config.cache.offload_disk_folder = options.offload_disk_folder
    config.parallel.expert_placement = options.expert_placement
    profile = None if options.profile is None else Profile.load(options.profile)
    tokens_per_hash = scale_of(options).block_tokens if options.trace is not None else float(HASH_BLOCK_TOKENS)
    sizes = _sizes(options.model, options.dtype, options.allow_unverified)
    sizes = replace(sizes, expert_imbalance=options.expert_imbalance)
    node = load_node(options.hardware)
    speculation = None if options.speculation is None else parse_speculation(options.speculation)
    return Planner(
        sizes, node, config, options.nodes, profile=profile, tokens_per_hash=tokens_per_hash, speculation=speculation
    )


def _config(max_num_seqs: int = 1024, max_num_batched_tokens: int = 8192) -> Config:
    return Config(
        model=ModelConfig(path="-"),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
        parallel=ParallelConfig(),
        cache=CacheConfig(),
    )


def _sizes(model: Any, dtype: str | None, allow_unverified: bool) -> ModelSizes:
    """Only config.json is read. Raises `UnsupportedModelError` for a model that the engine does not serve."""
    config = _model_config(model)
    check_supported(config, allow_unverified, "give --allow-unverified, in Python allow_unverified=True, to plan it")
    return sizes_of(config, dtype)


def _model_config(model: Any) -> Any:
    if not isinstance(model, str | Path):
        return model
    from ulysses_infer.model.loading.config_folder import folder_of_config, read_config_file
    from ulysses_infer.model.model import read_config

    path = Path(model).expanduser()
    if path.suffix == ".json" and path.name != "config.json":
        return read_config_file(path)
    return read_config(folder_of_config(ModelConfig(path=str(model))))


def _rows(options: argparse.Namespace) -> list[TraceRow]:
    if options.trace is None:
        return Traffic(
            input_len=options.input_len,
            output_len=options.output_len,
            rate=float("inf") if options.rate is None else options.rate,
            num_requests=options.num_prompts or DEFAULT_REQUESTS,
            burstiness=BURSTINESS if options.bursty else 1.0,
            seed=options.seed,
        ).rows()
    rows = window_of(options).cut(read_trace(options.trace))
    return scale_of(options).apply(rows if options.num_prompts is None else thinned(rows, options.num_prompts))


def _with_progress(planner: Planner, rows: Sequence[TraceRow], targets: Mapping[str, float]) -> Plan:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=1.0)

        def report(name: str, share: float) -> None:
            progress.update(task, description=f"simulating {name}", completed=share)

        return planner.plan(rows, targets, report)


def _explain(console: Console, planner: Planner, name: str) -> None:
    layout = next((layout for layout in planner.usable if name in (str(layout), str(layout.base))), None)
    if layout is None:
        known = ", ".join(map(str, planner.usable))
        raise ConfigError(f"--explain {name}: no usable layout of this name; those that fit are {known}")
    times = planner.times(layout)
    if not isinstance(times, AnalyticStepTimes):
        raise ConfigError("--explain needs predicted step times; leave out --profile")
    print_explanation(console, str(layout), layout.modes, times, planner.speculation)


def _check_outputs(options: argparse.Namespace) -> None:
    """Raise `ConfigError` before anything is simulated if a result could not be written afterwards."""
    for name, path in (("--recipe", options.recipe), ("--report", options.report)):
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            raise ConfigError(f"{name} {path}: it is no file in a folder that exists; give another path")


def _write(console: Console, planner: Planner, plan: Plan, options: argparse.Namespace) -> None:
    if options.recipe is not None:
        comment = f"written by ulysses-infer plan for {plan.num_nodes} x {plan.node.name}: {plan.best.candidate}"
        write_recipe(options.recipe, recipe_of(plan, planner.config, options.model), comment)
        console.print(f"recipe: {options.recipe}")
    if options.report is not None:
        from ulysses_infer.planning.report import write_report

        write_report(options.report, planner, plan, options.price)
        console.print(f"report: {options.report}")
