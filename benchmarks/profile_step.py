"""Profile of a step: matrix products, attention, collectives, and the rest (the engine's overhead).

    python -m benchmarks.profile_step --model DIR --sp 1 [--batch 1] [key=value overrides]
    deepspeed --num_gpus 2 benchmarks/profile_step.py --model DIR [--sp 2] [--mode tp] [--batch 1] [key=value overrides]

Runs decodes of `--batch` requests, or with `--prefill N` prompts of N tokens, in one mode on every rank, times the
kinds of work on rank 0, and prints the median and the minimum over the steps. The time of a collective includes waiting
for the other ranks. In steps replayed from a CPU graph (decodes with native kernels) every native call is timed. In
other steps, timers wrap the interfaces of each kind of work; they cost about a microsecond per call, which counts as
overhead, and norms, rotary angles and gates are part of "everything else".
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from benchmarks.arguments import common_options, launcher_options
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.inference import InferenceEngine
from ulysses_infer.job.lifetime import end_with_launcher
from ulysses_infer.native import function as native
from ulysses_infer.native.matmul import Weights
from ulysses_infer.worker.graphs.cpu_graphs import CpuGraphRunner
from ulysses_infer.worker.graphs.cpu_mixed_graphs import CpuMixedGraphRunner

Step = tuple[float, defaultdict[str, float]]  # seconds, and seconds by kind of work
PREFILLS = 12
KINDS = ("matrix products", "attention", "collectives", "norms, rotary, gates")
KIND_OF_CALL = dict(zip(native.KINDS, (*KINDS[:2], KINDS[3], *[KINDS[2]] * 3), strict=True))


class Clock:
    """Seconds by kind of work within the current step; nested work counts once, as the inner kind."""

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
    """A proxy of an object that times some of its methods."""

    def __init__(self, original: Any, clock: Clock, kind: str, methods: tuple[str, ...]) -> None:
        self._original, self._clock = original, clock
        for name in methods:
            setattr(self, name, clock.timed(kind, getattr(original, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class TorchProducts:
    """What `NativeMatmul` does for linear layers, by torch."""

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `NativeMatmul`."""
        return functional.linear(inputs, weight, bias)

    def joint(self, inputs: Tensor, weights: Sequence[Weights]) -> list[Tensor]:
        """See `NativeMatmul.joint`."""
        return [functional.linear(inputs, *pair) for pair in weights]


class TimedProducts(Timed):
    """A proxy of a step's matrix products."""

    def __call__(self, *args: Any) -> Any:
        """See `NativeMatmul`."""
        return self._clock.timed("matrix products", self._original)(*args)


def attach_adapters(engine: InferenceEngine, clock: Clock) -> None:
    """Time the worker's matrix products, attention backend and collectives."""
    assert engine._rank is not None
    worker = engine._rank.worker
    exchanges = ("tokens_to_heads", "heads_to_tokens", "gather_rows", "sum_over_tp")
    for mode, collectives in list(worker.groups.by_mode.items()):
        worker.groups.by_mode[mode] = Timed(collectives, clock, "collectives", exchanges)  # type: ignore[assignment]
    worker.contexts.backend = Timed(worker.backend, clock, "attention", ("attend",))
    products = worker.matmul or TorchProducts()
    worker.contexts.matmul = TimedProducts(products, clock, "matrix products", ("joint",))  # type: ignore[assignment]


def measure(engine: InferenceEngine, batch: int, input_len: int, output_len: int, prefill: int = 0) -> list[Step]:
    """(seconds, seconds by kind) of each decode step of a full batch, or of each prefill.

    On rank 0 a step is the whole engine step, from scheduling to processing the tokens.
    """
    clock = Clock()
    steps: list[Step] = []
    assert engine._rank is not None
    worker = engine._rank.worker
    run, engine_of_rank0 = worker.run, engine._engine

    def run_share(plan: Any, *args: Any) -> Any:
        clock.seconds.clear()
        result = run(plan, *args)
        for graphs in worker.all_graphs:
            if isinstance(graphs, CpuGraphRunner | CpuMixedGraphRunner):
                for kind, seconds in graphs.seconds.items():
                    clock.seconds[KIND_OF_CALL[kind]] += seconds
        return result

    def run_step() -> Any:
        assert engine_of_rank0 is not None
        started = time.perf_counter()
        result = step()
        seconds = time.perf_counter() - started
        if engine_of_rank0.stats.recent[-1].num_tokens == (prefill or batch):
            steps.append((seconds, defaultdict(float, clock.seconds)))
        return result

    attach_adapters(engine, clock)
    worker.run = run_share  # type: ignore[assignment, method-assign]
    if engine_of_rank0 is not None:  # only rank 0 has an engine
        step, engine_of_rank0.step = engine_of_rank0.step, run_step  # type: ignore[method-assign]
    draw = random.Random(0)
    vocab_size = worker.model.shape.vocab_size
    groups = [[prefill]] * PREFILLS if prefill else [[input_len] * batch]
    for lengths in groups:
        prompts = [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]
        output_tokens = 1 if prefill else output_len
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True))
    return steps[3:]  # without the first steps, which run layer by layer or are recorded


def list_functions(engine: InferenceEngine, arguments: argparse.Namespace) -> None:
    """Decode again under Python's profiler. It takes most of the time itself, so only compare functions."""
    profiler = cProfile.Profile()
    assert engine._rank is not None
    worker = engine._rank.worker
    worker.run = profiled(worker.run, profiler)  # type: ignore[method-assign]
    measure(engine, arguments.batch, arguments.input_len, arguments.output_len)
    if engine.is_first:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(arguments.functions)


def profiled(function: Callable[..., Any], profiler: cProfile.Profile) -> Callable[..., Any]:
    """`function`, profiled with `profiler`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        profiler.enable()
        try:
            return function(*args, **kwargs)
        finally:
            profiler.disable()

    return run


def report(steps: list[Step], title: str) -> None:
    """Print the median and the minimum of each part; on a busy machine the minimum is more reliable."""
    parts = {kind: [by_kind[kind] for _, by_kind in steps] for kind in KINDS}
    parts["everything else"] = [seconds - sum(by_kind.values()) for seconds, by_kind in steps]
    parts["step"] = [seconds for seconds, _ in steps]
    total = statistics.median(parts["step"])
    table = Table(title=title)
    for column in ("part", "median ms", "% of step", "min ms"):
        table.add_column(column, justify="right" if column != "part" else "left")
    for kind, seconds in parts.items():
        median = statistics.median(seconds)
        table.add_row(kind, f"{median * 1e3:.2f}", f"{median / total:.1%}", f"{min(seconds) * 1e3:.2f}")
    Console().print(table)


def main() -> None:
    """Parse, run on every rank, print on rank 0."""
    end_with_launcher()
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0] if __doc__ else None,
        parents=[common_options(sp=2, input_len=128, output_len=32), launcher_options()],
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", default="tp", help="tp or sp")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=0, help="time prefills of this many tokens instead of decodes")
    parser.add_argument(
        "--functions", type=int, default=0, help="also list this many functions, sorted by their own time"
    )
    parser.add_argument("overrides", nargs="*", help="recipe keys as key=value")
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
            report(steps, f"{kind}, mode {arguments.mode}, {threads} thread(s) per rank")


if __name__ == "__main__":
    main()
