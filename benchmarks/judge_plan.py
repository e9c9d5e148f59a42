"""Compares the planner's predictions with published measurements on H200.

Run from the repository root: `python -m benchmarks.judge_plan [--public FILE]`. The first table has the data-parallel
and tensor-parallel columns of Hidayetoglu et al., "Shift Parallelism", arXiv 2509.16495, figure 12: lone requests of
4096 tokens in and 250 out for latencies, all at once for throughput. FILE: silicon_dense_moe.csv of the repository
ai-dynamo/aiconfigurator (Apache-2.0), end-to-end measurements of other engines, here those of Llama-3.1-8B in FP8 on 1,
2, 4 and 8 GPUs. No constant is fitted to the second table.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from transformers import LlamaConfig

from tools.memory_table import read_config
from ulysses_infer.bench.serve.traces import TraceRow
from ulysses_infer.config import Config, ModelConfig, SchedulerConfig
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.node import load_node
from ulysses_infer.planning.planner import Candidate, Planner
from ulysses_infer.planning.replica import SimulatedReplica
from ulysses_infer.planning.results import Figures, figures_of
from ulysses_infer.planning.simulation import Fleet, simulate
from ulysses_infer.planning.sizes import ModelSizes, sizes_of
from ulysses_infer.planning.workload import Traffic

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


class Published(NamedTuple):
    """TTFT and TPOT of a lone request in ms, and tokens per second of many."""

    ttft: float
    tpot: float
    tokens_per_second: float


PAPER = {
    ("llama-3.3-70b", "fp8"): {"DP": Published(614, 22.5, 45.9e3), "TP": Published(159, 9.34, 24.7e3)},
    ("qwen3-32b", "fp8_block"): {"DP": Published(385, 18.8, 70.1e3), "TP": Published(113, 8.68, 38.3e3)},
}
OTHER_ENGINES: dict[str, Any] = {"step_seconds": 2.27e-3, "hidden_tokens": 0}
"""The host of engines that wait for each step: fitted to the paper's columns, the only constant that is."""
LAYOUTS = {"DP": (8, Mode(1, 1)), "TP": (1, Mode(1, 8))}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", type=Path, metavar="FILE")
    options = parser.parse_args()
    _print_paper()
    if options.public is not None:
        _print_public(options.public)


def _print_paper() -> None:
    print(
        "| model | layout | TTFT ms | paper | TPOT ms | paper | tokens/s | paper |\n|---|---|---|---|---|---|---|---|"
    )
    for (model, dtype), columns in PAPER.items():
        sizes = sizes_of(read_config(Path("configs/models") / f"{model}.json"), dtype)
        for name, paper in columns.items():
            dp, mode = LAYOUTS[name]
            lone = _figures(sizes, dp, mode, Traffic(4096, 250, 1e-3, 2).rows())
            many = _figures(sizes, dp, mode, Traffic(4096, 250, math.inf, 512).rows())
            ours = Published(lone.ttft.mean, lone.tpot.mean, many.tokens_per_second)
            cells = [
                f"{own:,.4g} | {theirs:,.4g} ({own / theirs - 1:+.0%})" for own, theirs in zip(ours, paper, strict=True)
            ]
            print(f"| {model} {dtype} | {name} | {' | '.join(cells)} |", flush=True)


def _print_public(path: Path) -> None:
    sizes = sizes_of(LlamaConfig(**LLAMA_8B), "fp8")
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model_path"].startswith("meta-llama/Llama-3.1-8B")]
    for row in rows:
        batch, count = int(float(row["batch_size"])), min(512, 3 * int(float(row["batch_size"])))
        if row["mode"] != "agg" or batch > 128:
            continue
        requests = [TraceRow(0.0, int(row["isl"]), int(row["osl"]))] * count
        found = _figures(sizes, 1, Mode(1, int(row["tp_size"])), requests, batch)
        for name, own in (("TTFT", found.ttft.mean), ("TPOT", found.tpot.mean)):
            theirs = float(row[f"silicon_{name.lower()}_ms"])
            errors[name, row["tp_size"]].append(own / theirs - 1)
    print("\n| Llama-3.1-8B FP8 | GPUs | rows | mean error | mean absolute error |\n|---|---|---|---|---|")
    for (name, gpus), found_errors in sorted(errors.items()):
        absolute = mean(map(abs, found_errors))
        print(f"| {name} | {gpus} | {len(found_errors)} | {mean(found_errors):+.0%} | {absolute:.0%} |")


def _figures(
    sizes: ModelSizes, dp: int, mode: Mode, rows: list[TraceRow], max_concurrency: int | None = None
) -> Figures:
    node = load_node("8xh200")
    node = replace(node, host=replace(node.host, **OTHER_ENGINES))
    scheduler = SchedulerConfig(max_num_seqs=1024, max_num_batched_tokens=8192)
    planner = Planner(sizes, node, Config(model=ModelConfig(path="-"), scheduler=scheduler))
    layout = next(layout for layout in planner.layouts if layout.base.tp == mode.tp and layout.base.sp == mode.sp)
    times = planner.times(layout)
    settings = planner.settings(layout)
    policy = Candidate(layout, "static", mode)
    fleet = Fleet(dp, lambda: SimulatedReplica(settings, times, planner.policy(policy, times)))
    result = simulate(rows, fleet, times.request_seconds, max_concurrency=max_concurrency)
    return figures_of(result, fleet.replicas, {})


if __name__ == "__main__":
    main()
