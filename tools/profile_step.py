"""Where a decode step's time goes: matrix products, attention, collectives, and the rest (the engine's overhead).

    deepspeed --num_gpus 2 tools/profile_step.py --model DIR [--mode tp] [--batch 1] [key=value overrides]

Runs a decode of `--batch` requests in one mode on every rank, times the three kinds of work on rank 0 through the
interfaces they sit behind, and prints the median over the decode steps. A collective's time includes waiting for the
other ranks. The timers themselves cost about a microsecond a call, which counts as overhead.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.inference import InferenceEngine
from ulysses_infer.model.head import ShardedHead
from ulysses_infer.model.linear import ShiftLinear

Step = tuple[float, defaultdict[str, float]]  # seconds, and seconds by kind of work
KINDS = ("matrix products", "attention", "collectives")


class Clock:
    """Seconds by kind of work within the current step; a kind inside another counts once, as the inner one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time (less that of timed functions within it) added to `kind`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            elapsed = time.perf_counter() - started
            inner = self._inner.pop()
            self.seconds[kind] += elapsed - inner
            self._inner[-1] += elapsed
            return result

        return run


class Timed:
    """An object of which some methods are timed and everything else is the original's."""

    def __init__(self, original: Any, clock: Clock, kind: str, methods: tuple[str, ...]) -> None:
        self._original = original
        for name in methods:
            setattr(self, name, clock.timed(kind, getattr(original, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def attach(engine: InferenceEngine, clock: Clock) -> None:
    """Put timers on the worker's linears, attention backend and collectives."""
    assert engine._rank is not None
    worker = engine._rank.worker
    exchanges = ("tokens_to_heads", "heads_to_tokens", "gather_rows", "sum_over_tp")
    for mode, collectives in list(worker.groups.by_mode.items()):
        worker.groups.by_mode[mode] = Timed(collectives, clock, "collectives", exchanges)  # type: ignore[assignment]
    worker.backend = Timed(worker.backend, clock, "attention", ("attend",))
    for module in worker.model.module.modules():
        if isinstance(module, ShiftLinear | ShardedHead):
            module.forward = clock.timed("matrix products", module.forward)  # type: ignore[method-assign]


def measure(engine: InferenceEngine, batch: int, input_len: int, output_len: int) -> list[Step]:
    """Decode steps of a full batch: (seconds, seconds by kind) of each, on rank 0."""
    clock = Clock()
    steps: list[Step] = []
    assert engine._rank is not None
    worker = engine._rank.worker
    run = worker.run

    def run_step(plan: Any, *args: Any) -> Any:
        clock.seconds.clear()
        started = time.perf_counter()
        result = run(plan, *args)
        if plan.num_tokens == batch:
            steps.append((time.perf_counter() - started, defaultdict(float, clock.seconds)))
        return result

    attach(engine, clock)
    worker.run = run_step  # type: ignore[assignment, method-assign]
    draw = random.Random(0)
    vocab_size = worker.model.shape.vocab_size
    prompts = [[draw.randrange(vocab_size) for _ in range(input_len)] for _ in range(batch)]
    engine.generate(prompts, SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True))
    return steps[2:]


def report(steps: list[Step], title: str) -> None:
    """Print the median step."""
    total = statistics.median(seconds for seconds, _ in steps)
    parts = {kind: statistics.median(by_kind[kind] for _, by_kind in steps) for kind in KINDS}
    parts["everything else"] = statistics.median(seconds - sum(by_kind.values()) for seconds, by_kind in steps)
    table = Table(title=title)
    for column in ("part", "ms", "% of step"):
        table.add_column(column, justify="right" if column != "part" else "left")
    for kind, seconds in {**parts, "step": total}.items():
        table.add_row(kind, f"{seconds * 1e3:.2f}", f"{seconds / total:.1%}")
    Console().print(table)


def main() -> None:
    """Parse, run on every rank, print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", default="tp", help="tp or sp")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    parallel = {"sp": arguments.sp, "tp": 1}
    policy = {"name": "static", "mode": arguments.mode}
    with init_inference(arguments.model, parallel=parallel, policy=policy) as engine:
        steps = measure(engine, arguments.batch, arguments.input_len, arguments.output_len)
        if engine.is_first:
            threads = torch.get_num_threads()
            report(steps, f"decode step, {arguments.batch} requests, mode {arguments.mode}, {threads} thread(s) a rank")


if __name__ == "__main__":
    main()
