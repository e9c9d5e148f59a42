"""The workload of an offline benchmark and the measurement of one run."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.inference import InferenceEngine
from ulysses_infer.outputs import RequestOutput
from ulysses_infer.sampling_params import SamplingParams

WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class Workload:
    """Requests that arrive together, with random prompts and outputs of a fixed length."""

    input_len: int
    output_len: int
    num_prompts: int
    seed: int = 0

    def prompts(self, repeat: int, vocab_size: int) -> list[list[int]]:
        """Token ids of every prompt: the same for each mode, different in each repeat."""
        draw = random.Random(f"{self.seed}/{repeat}")
        return [[draw.randrange(vocab_size) for _ in range(self.input_len)] for _ in range(self.num_prompts)]

    def num_blocks(self, block_size: int) -> int:
        """Cache blocks that the whole workload needs."""
        return self.num_prompts * ceil_div(self.input_len + self.output_len, block_size)


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


def measure(engine: InferenceEngine, prompts: list[list[int]], output_len: int) -> Sample:
    """Run a workload once, greedily and ignoring end-of-sequence. Collective; all ranks get the same sample."""
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    return sample_of(engine.generate(prompts, params))


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
