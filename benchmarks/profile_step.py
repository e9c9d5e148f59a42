"""Where a step's time goes: matrix products, attention, collectives, and the rest (the engine's overhead).

    python -m benchmarks.profile_step --model DIR --sp 1 [--batch 1] [key=value overrides]
    deepspeed --num_gpus 2 benchmarks/profile_step.py --model DIR [--sp 2] [--mode tp] [--batch 1] [key=value overrides]

Runs decodes of `--batch` requests, or with `--prefill N` prompts of N tokens, in one mode on every rank, times the
kinds of work on rank 0, and prints the median and the least over the steps. A collective's time includes waiting for
the other ranks. Steps repeated from a graph (decodes on a CPU's native kernels) are timed there, call by call; others
through the interfaces that the kinds of work sit behind, where the timers cost about a microsecond a call, which counts
as overhead; norms, rotary angles and gates are then under "everything else".
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from benchmarks.arguments import common_options, launcher_options
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.inference import InferenceEngine
from ulysses_infer.native import function as native
from ulysses_infer.worker.cpu_graphs import CpuGraphRunner

Step = tuple[float, defaultdict[str, float]]  # seconds, and seconds by kind of work
PREFILLS = 12
KINDS = ("matrix products", "attention", "collectives", "norms, rotary, gates")
ON_TAPES = dict(zip(native.KINDS, (*KINDS[:2], KINDS[3], *[KINDS[2]] * 3), strict=True))


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


def attach_adapters(engine: InferenceEngine, clock: Clock) -> None:
    """Put timers on the worker's matrix products, attention backend and collectives."""
    assert engine._rank is not None
    worker = engine._rank.worker
    exchanges = ("tokens_to_heads", "heads_to_tokens", "gather_rows", "sum_over_tp")
    for mode, collectives in list(worker.groups.by_mode.items()):
        worker.groups.by_mode[mode] = Timed(collectives, clock, "collectives", exchanges)  # type: ignore[assignment]
    worker.contexts.backend = Timed(worker.backend, clock, "attention", ("attend",))
    worker.contexts.matmul = clock.timed("matrix products", worker.matmul or functional.linear)  # type: ignore[assignment]


def measure(engine: InferenceEngine, batch: int, input_len: int, output_len: int, prefill: int = 0) -> list[Step]:
    """Decode steps of a full batch, or prefills: (seconds, seconds by kind) of each.

    On rank 0 a step is all that the engine does for one: from choosing the requests to giving them their tokens.
    """
    clock = Clock()
    steps: list[Step] = []
    assert engine._rank is not None
    worker = engine._rank.worker
    run, brain = worker.run, engine._engine

    def run_share(plan: Any, *args: Any) -> Any:
        clock.seconds.clear()
        result = run(plan, *args)
        if isinstance(worker.graphs, CpuGraphRunner):
            for kind, seconds in worker.graphs.seconds.items():
                clock.seconds[ON_TAPES[kind]] += seconds
        return result

    def run_step() -> Any:
        assert brain is not None
        started = time.perf_counter()
        result = step()
        seconds = time.perf_counter() - started
        if brain.stats.recent[-1].num_tokens == (prefill or batch):
            steps.append((seconds, defaultdict(float, clock.seconds)))
        return result

    attach_adapters(engine, clock)
    worker.run = run_share  # type: ignore[assignment, method-assign]
    if brain is not None:  # the other ranks do no more than their share
        step, brain.step = brain.step, run_step  # type: ignore[method-assign]
    draw = random.Random(0)
    vocab_size = worker.model.shape.vocab_size
    groups = [[prefill]] * PREFILLS if prefill else [[input_len] * batch]
    for lengths in groups:
        prompts = [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]
        output_tokens = 1 if prefill else output_len
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True))
    return steps[3:]  # without the first, which is run as ever, and the second, which is recorded


def list_functions(engine: InferenceEngine, arguments: argparse.Namespace) -> None:
    """Decode once more under Python's profiler, which itself takes most of the time: for comparing functions only."""
    profiler = cProfile.Profile()
    assert engine._rank is not None
    worker = engine._rank.worker
    worker.run = profiled(worker.run, profiler)  # type: ignore[method-assign]
    measure(engine, arguments.batch, arguments.input_len, arguments.output_len)
    if engine.is_first:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(arguments.functions)


def profiled(function: Callable[..., Any], profiler: cProfile.Profile) -> Callable[..., Any]:
    """`function`, under `profiler`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        profiler.enable()
        try:
            return function(*args, **kwargs)
        finally:
            profiler.disable()

    return run


def report(steps: list[Step], title: str) -> None:
    """Print the median step, and of each part the least that any step took: on a busy machine that says more."""
    parts = {kind: [by_kind[kind] for _, by_kind in steps] for kind in KINDS}
    parts["everything else"] = [seconds - sum(by_kind.values()) for seconds, by_kind in steps]
    parts["step"] = [seconds for seconds, _ in steps]
    total = statistics.median(parts["step"])
    table = Table(title=title)
    for column in ("part", "median ms", "% of step", "least ms"):
        table.add_column(column, justify="right" if column != "part" else "left")
    for kind, seconds in parts.items():
        median = statistics.median(seconds)
        table.add_row(kind, f"{median * 1e3:.2f}", f"{median / total:.1%}", f"{min(seconds) * 1e3:.2f}")
    Console().print(table)


def main() -> None:
    """Parse, run on every rank, print on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0] if __doc__ else None,
        parents=[common_options(sp=2, input_len=128, output_len=32), launcher_options()],
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", default="tp", help="tp or sp")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=0, help="tokens of a prompt: time prefills, not decodes")
    parser.add_argument("--functions", type=int, default=0, help="also list so many functions by their own time")
    parser.add_argument("overrides", nargs="*", help="key=value, as in a recipe")
    arguments = parser.parse_args()
    settings = {
        "parallel.sp": arguments.sp,
        "policy.name": "static",
        "policy.mode": arguments.mode,
        **dict(pair.split("=", 1) for pair in arguments.overrides),
    }
    with init_inference(arguments.model, None, **settings) as engine:
        steps = measure(engine, arguments.batch, arguments.input_len, arguments.output_len, arguments.prefill)
        if arguments.functions:
            list_functions(engine, arguments)
        if engine.is_first:
            threads = torch.get_num_threads()
            tokens, requests = arguments.prefill, arguments.batch
            kind = f"prefill, {tokens} tokens" if tokens else f"decode, {requests} requests"
            report(steps, f"{kind}, mode {arguments.mode}, {threads} thread(s) a rank")


if __name__ == "__main__":
    main()
