"""Plans the four models of the Shift Parallelism paper on 8 x H200 for production traces; prints docs/planning.md's
tables.

Run from the repository root: `python -m benchmarks.plan_traces TRACE [TRACE ...]`, with Azure's code trace (.csv) or
Mooncake's conversations (.jsonl), of which the paper's windows are used. All candidates are simulated with the first
requests, the best of them with the whole window. `--changes` prints instead what three changes of the engine would gain
by the model, `--speed` how long simulations take (a minute).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.memory_table import read_config
from ulysses_infer.bench.replay.scaling import paper_window
from ulysses_infer.bench.serve.traces import TraceRow, read_trace
from ulysses_infer.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from ulysses_infer.engine.profile_key import device_name
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.node import load_node
from ulysses_infer.planning.operations import Changes
from ulysses_infer.planning.planner import Candidate, Planner
from ulysses_infer.planning.sizes import sizes_of
from ulysses_infer.planning.step_times import AnalyticStepTimes
from ulysses_infer.planning.workload import Traffic
from ulysses_infer.step_time.step_shape import StepShape
from ulysses_infer.worker.memory import freeze_gc, relax_gc

MODELS = {
    "llama-3.3-70b": "fp8",
    "qwen3-32b": "fp8_block",
    "llama-4-scout-17b-16e": "bf16",
    "qwen3-30b-a3b": "bf16",
}
BLOCK_SIZE = 128  # ids of traces stand for 512 tokens; small blocks would only take longer to simulate
SHORTLIST = 3  # candidates that are simulated with the whole trace: the best of
SHORTLIST_REQUESTS = 400  # its first requests
CHANGES = {
    "as it is": Changes(),
    "without fused all-reduce and norm": Changes(fused_all_reduce=False),
    "FP8 exchanges": Changes(fp8_exchange=True),
    "attention by request": Changes(attention_by_request=True),
}


def main() -> None:
    """Print the tables, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--changes", action="store_true")
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    freeze_gc()  # as the command does, and relaxes it
    relax_gc()
    if options.speed:
        _print_speed(options.models[0], options.traces)
        return
    if options.changes:
        _print_changes()
        return
    columns = ["model", "trace", "recommended", "TTFT p50 / p99 ms", "TPOT p50 / p99 ms", "tokens/s"]
    columns += ["against static TP", "SP faster above"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for path in options.traces:
        rows = paper_window(path).cut(read_trace(path))
        for model in options.models:
            print(f"| {' | '.join(_cells(model, path, rows))} |", flush=True)


def _cells(model: str, path: Path, rows: Sequence[TraceRow]) -> list[str]:
    own = planner(model)
    layout = next(layout for layout in own.usable if layout.base == Mode(8, 1))
    static = own.evaluate(Candidate(layout, "static", Mode(1, 8)), rows, {}).figures
    first = own.plan(rows[:SHORTLIST_REQUESTS], {})
    found = [own.evaluate(each.candidate, rows, {}) for each in first.evaluations[:SHORTLIST]]
    best = min(found, key=lambda evaluation: evaluation.figures.latency.mean)
    ttft, tpot = best.figures.ttft, best.figures.tpot
    gain = static.latency.mean / best.figures.latency.mean
    return [
        model,
        path.name.split("_")[0],
        str(best.candidate),
        f"{ttft.p50:,.0f} / {ttft.p99:,.0f}",
        f"{tpot.p50:.1f} / {tpot.p99:.1f}",
        f"{best.figures.tokens_per_second:,.0f}",
        f"{gain:.2f}x lower mean latency",
        f"{own.crossover(layout)} tokens",
    ]


def planner(model: str, changes: Changes | None = None) -> Planner:
    """The planner of a model on 8 x H200."""
    sizes = sizes_of(read_config(Path("configs/models") / f"{model}.json"), MODELS[model])
    config = Config(
        model=ModelConfig(path="-", max_model_len=131072),
        scheduler=SchedulerConfig(max_num_seqs=1024, max_num_batched_tokens=8192),
        cache=CacheConfig(block_size=BLOCK_SIZE),
    )
    return Planner(sizes, load_node("8xh200"), config, changes=changes)


def _print_speed(model: str, paths: Sequence[Path]) -> None:
    """Processor seconds of one simulation of a trace, the least of three, and how much faster than the trace it is."""
    print(f"{model} on {device_name(torch.device('cpu'))}")
    print("| trace | requests | policy | processor seconds | times faster than the trace |\n|---|---|---|---|---|")
    own = planner(model)
    layout = next(layout for layout in own.usable if layout.base == Mode(8, 1))
    for path in paths:
        rows = paper_window(path).cut(read_trace(path))
        for policy in ("static", "threshold", "adaptive"):
            candidate = Candidate(layout, policy, layout.base, own.crossover(layout))
            seconds = min(_processor_seconds(own, candidate, rows) for _ in range(3))
            cells = [path.name.split("_")[0], str(len(rows)), policy, f"{seconds:.1f}", f"{rows[-1].at / seconds:,.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def _processor_seconds(own: Planner, candidate: Candidate, rows: Sequence[TraceRow]) -> float:
    started = time.process_time()
    own.evaluate(candidate, rows, {})
    return time.process_time() - started


def _print_changes() -> None:
    """A decode of 8 requests in TP, a prefill of 8192 tokens in SP, and throughput of 512 requests at once."""
    print("| model | change | decode, 8 requests, TP ms | 8192 prompt tokens, SP ms | saturated tokens/s, SP |")
    print("|---|---|---|---|---|")
    for model in MODELS:
        for name, changes in CHANGES.items():
            own = planner(model, changes)
            layout = next((one for one in own.usable if one.base == Mode(8, 1)), own.usable[0])
            times = own.times(layout)
            assert isinstance(times, AnalyticStepTimes)
            decode = 1e3 * times.device_seconds(layout.layout.shift, StepShape.of([4096] * 8, []))
            prefill = 1e3 * times.device_seconds(layout.base, StepShape.of([], [(0, 8192)]))
            many = own.evaluate(Candidate(layout, "static", layout.base), Traffic(4096, 250, math.inf, 256).rows(), {})
            figures = f"{decode:.2f} | {prefill:.1f} | {many.figures.tokens_per_second:,.0f}"
            print(f"| {model} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
