"""The workloads of a comparison: the protocols of the Shift Parallelism paper, scaled to the machine.

Timed loads are shares of the machine's capacity (`Capacity`), which is measured first, so that they are comparable
between a laptop and eight GPUs.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ulysses_infer.bench.replay.scaling import MINUTE, PAPER_WINDOWS, Scale, thinned
from ulysses_infer.bench.serve.repetition import REPETITIVE
from ulysses_infer.bench.serve.traces import HASH_BLOCK_TOKENS, TraceRow, read_trace
from ulysses_infer.errors import ConfigError

LONE, SATURATED, TIMED = "lone", "saturated", "timed"
REPETITION = "repetition"
RATE_SHARES = (0.25, 0.5, 0.75, 1.0)  # shares of the measured capacity
STEADY_SHARE, BURST_SHARE = 0.1, 0.4  # the base load, and the average load of the bursts
NUM_BURSTS = 4
TRACE_SHARE = 0.5
LONGEST_ANSWER = 8  # limit on answers of a trace, as a multiple of the scale's output length


@dataclass(frozen=True)
class WorkloadSizes:
    """The sizes of all workloads."""

    input_len: int
    output_len: int
    num_lone: int
    num_saturated: int
    contexts: tuple[int, ...]
    """Prompt lengths of the context sweep."""
    seconds: float
    """Seconds of each timed workload."""

    def fitting(self, max_model_len: int) -> WorkloadSizes:
        """The sizes, limited to the model's maximum length. Raises `ConfigError` if it is too short."""
        output_len = min(self.output_len, max_model_len // 2)
        longest = max_model_len - output_len
        if longest < 1:
            raise ConfigError(f"model.max_model_len {max_model_len} leaves no room for a prompt and an answer")
        contexts = tuple(dict.fromkeys(min(length, longest) for length in self.contexts))
        return dataclasses.replace(
            self, input_len=min(self.input_len, longest), output_len=output_len, contexts=contexts
        )


SCALES = {
    "smoke": WorkloadSizes(24, 6, 1, 4, (8, 48), 0.8),
    "laptop": WorkloadSizes(512, 32, 4, 24, (128, 512, 1024, 2048), 20.0),
    "node": WorkloadSizes(4096, 250, 8, 512, (2048, 8192, 32768, 131072), 300.0),
}


@dataclass(frozen=True)
class Capacity:
    """The throughput of the saturated machine with requests of the scale's lengths."""

    requests: float
    """Requests per second."""
    tokens: float
    """Prompt and output tokens per second."""


@dataclass(frozen=True)
class ComparisonCase:
    """One workload, the same for every contender."""

    protocol: str
    name: str
    """Unique; used in file names."""
    title: str
    kind: str
    """lone: one request after another; saturated: all at once; timed: each at its arrival time."""
    rows: tuple[TraceRow, ...]
    x: float | None = None
    """Position in its sweep."""
    block_tokens: float = HASH_BLOCK_TOKENS
    """Prompt tokens per hash id of the rows."""
    dataset: str = ""
    """One of `REPETITIVE`; "": random prompts with the lengths of the rows."""


@dataclass(frozen=True)
class ProtocolInputs:
    """The inputs of all protocols."""

    sizes: WorkloadSizes
    capacity: Capacity
    max_model_len: int
    traces: Sequence[Path] = ()
    seed: int = 0


def shape(inputs: ProtocolInputs) -> list[ComparisonCase]:
    """Fig. 12 of the paper: a single request, and a saturated machine."""
    sizes = inputs.sizes
    return _pair("shape", "shape", sizes.input_len, sizes, sizes.num_lone, sizes.num_saturated)


def context(inputs: ProtocolInputs) -> list[ComparisonCase]:
    """The same over prompt lengths. There are fewer long prompts, so that each point takes about as long."""
    sizes, cases = inputs.sizes, []
    for length in sizes.contexts:
        count = max(2, min(sizes.num_saturated, round(sizes.num_saturated * sizes.input_len / length / 2)))
        cases += _pair("context", f"context-{length}", length, sizes, max(1, sizes.num_lone // 2), count, length)
    return cases


def _pair(
    protocol: str,
    name: str,
    input_len: int,
    sizes: WorkloadSizes,
    num_lone: int,
    num_saturated: int,
    x: float | None = None,
) -> list[ComparisonCase]:
    row, words = TraceRow(0.0, input_len, sizes.output_len), f"{input_len} tokens in, {sizes.output_len} out"
    lone = ComparisonCase(protocol, f"{name}-lone", f"a single request, {words}", LONE, (row,) * num_lone, x)
    title = f"{num_saturated} concurrent requests, {words}"
    return [lone, ComparisonCase(protocol, f"{name}-saturated", title, SATURATED, (row,) * num_saturated, x)]


def rate(inputs: ProtocolInputs) -> list[ComparisonCase]:
    """Poisson arrivals at shares of the capacity."""
    cases = []
    for share in RATE_SHARES:
        per_second = share * inputs.capacity.requests
        rows = tuple(_arrivals(inputs, per_second, inputs.sizes.seconds, f"{share}"))
        title = f"{per_second:.3g} requests/s, {share:.0%} of the capacity"
        cases.append(ComparisonCase("rate", f"rate-{round(share * 100)}", title, TIMED, rows, per_second))
    return cases


def bursty(inputs: ProtocolInputs) -> list[ComparisonCase]:
    """Table 5 of the paper: four bursts over a low steady rate."""
    seconds, per_second = inputs.sizes.seconds, inputs.capacity.requests
    steady = _arrivals(inputs, STEADY_SHARE * per_second, seconds, "steady")
    size = max(2, round(BURST_SHARE * per_second * seconds / NUM_BURSTS))
    usual = TraceRow(0.0, inputs.sizes.input_len, inputs.sizes.output_len)
    moments = [seconds * (2 * burst + 1) / (2 * NUM_BURSTS) for burst in range(NUM_BURSTS)]
    bursts = [dataclasses.replace(usual, at=at) for at in moments for _ in range(size)]
    rows = tuple(sorted([*steady, *bursts], key=lambda row: row.at))
    title = f"{NUM_BURSTS} bursts of {size} requests over {STEADY_SHARE * per_second:.2g} requests/s"
    return [ComparisonCase("bursty", "bursty", title, TIMED, rows)]


def repetition(inputs: ProtocolInputs) -> list[ComparisonCase]:
    """Answers that repeat parts of their prompts, lone and saturated. The prompts are text of about half the usual
    length."""
    sizes = inputs.sizes
    return [
        dataclasses.replace(case, title=f"{name}: {case.title}", dataset=name)
        for name in REPETITIVE
        for case in _pair(REPETITION, name, max(1, sizes.input_len // 2), sizes, sizes.num_lone, sizes.num_saturated)
    ]


def _arrivals(inputs: ProtocolInputs, per_second: float, seconds: float, name: str) -> list[TraceRow]:
    """At least one request of the scale's lengths, at uniformly random times."""
    sizes, draw = inputs.sizes, random.Random(f"arrivals/{inputs.seed}/{name}")
    times = sorted(draw.uniform(0, seconds) for _ in range(max(1, round(per_second * seconds))))
    return [TraceRow(at, sizes.input_len, sizes.output_len) for at in times]


def trace(inputs: ProtocolInputs) -> list[ComparisonCase]:
    """The paper's windows of production traces, scaled in rate and length to half of the capacity."""
    return [_trace(inputs, path) for path in inputs.traces]


def _trace(inputs: ProtocolInputs, path: Path) -> ComparisonCase:
    rows = read_trace(path)
    if path.suffix in PAPER_WINDOWS:
        rows = PAPER_WINDOWS[path.suffix].cut(rows)
    sizes = inputs.sizes
    most_output = min(LONGEST_ANSWER * sizes.output_len, inputs.max_model_len // 2)
    scale = Scale(
        time=sizes.seconds / max(rows[-1].at, 1e-9),
        length=min(1.0, sizes.input_len / statistics.fmean(row.input_len for row in rows)),
        max_input_len=inputs.max_model_len - most_output,
        max_output_len=most_output,
    )
    tokens = statistics.fmean(row.input_len + row.output_len for row in scale.apply(rows))
    chosen = thinned(rows, max(2, round(TRACE_SHARE * inputs.capacity.tokens * sizes.seconds / tokens)))
    title = (
        f"{path.stem}: {len(chosen)} of {len(rows)} requests, lengths x {scale.length:.2g}, "
        f"{rows[-1].at / MINUTE:.0f} minutes in {sizes.seconds:.3g} s"
    )
    return ComparisonCase("trace", path.stem, title, TIMED, tuple(scale.apply(chosen)), block_tokens=scale.block_tokens)


@dataclass(frozen=True)
class Protocol:
    """A kind of comparison."""

    name: str
    about: str
    cases: Callable[[ProtocolInputs], list[ComparisonCase]] = field(repr=False)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("shape", "a single request, and saturation", shape),
        Protocol("context", "both over the prompt length", context),
        Protocol("rate", "over the arrival rate", rate),
        Protocol("bursty", "four bursts over a low base rate", bursty),
        Protocol(REPETITION, "answers that repeat their prompts, for --speculation", repetition),
        Protocol("trace", "production traces given with --trace", trace),
    )
}
"""By name, in the order of execution."""
