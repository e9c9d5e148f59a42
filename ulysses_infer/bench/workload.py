"""The workload of an offline benchmark and the measurement of one run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.bench.step_sizes import Totals, totals
from ulysses_infer.inference import InferenceEngine
from ulysses_infer.outputs import RequestOutput
from ulysses_infer.sampling_params import SamplingParams

WARM_UP_TOKENS = 2
MAX_TAIL = 8  # outputs are at most this many times as long as the median
LEAST = {"num_prompts": 4, "input_len": 64, "samples": 4, "output_len": 8}
"""What workloads that are made smaller keep, in the order in which they are: a tail needs requests and tokens."""


@dataclass(frozen=True)
class Workload:
    """Requests that arrive together, with random prompts."""

    input_len: int
    output_len: int
    """Tokens of an output; their median if lengths differ."""
    num_prompts: int
    seed: int = 0
    samples: int = 1
    """Outputs per prompt, each a request of its own."""
    tail: float = 0.0
    """Standard deviation of the logarithm of output lengths; 0: all are equal."""

    def prompts(self, repeat: int, vocab_size: int, mode: str = "") -> list[list[int]]:
        """Token ids of every request's prompt, different in each repeat. The same for each mode, unless samples share
        cached prompts: then no mode must find those of another."""
        draw = random.Random(f"{self.seed}/{repeat}" + (f"/{mode}" if self.samples > 1 else ""))
        prompts = [[draw.randrange(vocab_size) for _ in range(self.input_len)] for _ in range(self.num_prompts)]
        return [prompt for prompt in prompts for _ in range(self.samples)]

    def output_lens(self, repeat: int) -> list[int]:
        """Tokens of every request's output: the same for each mode. Repeats only differ in which request has which.

        They are quantiles of the log-normal distribution, so that few requests have its tail too.
        """
        lengths = self.sorted_output_lens
        random.Random(f"{self.seed}/{repeat}/lengths").shuffle(lengths)
        return lengths

    @property
    def sorted_output_lens(self) -> list[int]:
        """Tokens of every output, the shortest first."""
        if not self.tail:
            return [self.output_len] * self.num_requests
        spread = NormalDist(0.0, self.tail)
        quantiles = (spread.inv_cdf((number + 0.5) / self.num_requests) for number in range(self.num_requests))
        return [min(max(1, round(self.output_len * math.exp(z))), self.longest_output) for z in quantiles]

    def smaller(self) -> Workload | None:
        """Half of the prompts; with few of them, half of their length, then of the samples, then of the outputs; None
        for the smallest workload."""
        for name, least in LEAST.items():
            size: int = getattr(self, name)
            if size > least:
                return replace(self, **{name: max(least, size // 2)})
        return None

    @property
    def num_requests(self) -> int:
        """Requests that arrive together."""
        return self.num_prompts * self.samples

    @property
    def longest_output(self) -> int:
        """Tokens that no output exceeds."""
        return self.output_len * MAX_TAIL if self.tail else self.output_len

    def num_blocks(self, block_size: int) -> int:
        """Cache blocks that the whole workload needs at most."""
        return self.num_requests * ceil_div(self.input_len + self.longest_output, block_size)


@dataclass(frozen=True)
class Sample:
    """One run of a workload in one mode."""

    ttft: float
    """Seconds to the first token, mean over the requests."""
    tpot: float
    """Seconds per output token after the first, mean over the requests; 0 for completions of one token."""
    seconds: float
    """From the arrival of the requests to the last token."""
    output_tokens: int
    total_tokens: int
    """Tokens of prompts and completions."""
    steps: Totals = field(default_factory=dict)
    """The engine's steps by size, on rank 0."""


RunPrompts = Callable[[list[list[int]], Sequence[int]], Sample | None]
"""Runs (prompts, output lengths) in one mode; returns None on a rank that does not take part."""


def measure(engine: InferenceEngine, prompts: list[list[int]], output_lens: Sequence[int]) -> Sample:
    """Run a workload once, greedily and ignoring end-of-sequence. Collective; all ranks get the same sample, except
    for its steps."""
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in output_lens]
    latest = engine.recent_steps[-1].sequence if engine.recent_steps else -1
    sample = sample_of(engine.generate(prompts, params))
    return replace(sample, steps=totals(step for step in engine.recent_steps if step.sequence > latest))


def sample_of(outputs: list[RequestOutput]) -> Sample:
    """Metrics from the timestamps of the requests, all taken on rank 0."""
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    ttfts = [m.ttft for m in metrics if m.ttft is not None]
    ends = [m.finished_time for m in metrics if m.finished_time is not None]
    output_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return Sample(
        ttft=sum(ttfts) / len(ttfts),
        tpot=sum(m.tpot or 0.0 for m in metrics) / len(metrics),
        seconds=max(ends) - min(m.arrival_time for m in metrics),
        output_tokens=output_tokens,
        total_tokens=output_tokens + sum(len(output.prompt_token_ids) for output in outputs),
    )
