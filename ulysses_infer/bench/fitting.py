"""The largest workload whose runs fit a time, predicted from a short probe of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ulysses_infer.bench.workload import WARM_UP_TOKENS, RunPrompts, Sample, Workload

PROBED_PROMPTS, PROBED_SAMPLES, PROBED_INPUT, PROBED_TOKENS = 2, 4, 64, 8
PROBE = -2  # number of the repeat, whose prompts no other has


@dataclass(frozen=True)
class Pace:
    """What the probe measured in one mode; seconds."""

    prompt_token: float
    """Per token of a request's prompt."""
    lone_step: float
    """Per step of one output."""
    step: float
    """Per step of `rows` outputs together."""
    rows: int

    def step_of(self, rows: int) -> float:
        """Seconds of a step of so many outputs, in proportion between and beyond the two that were measured."""
        slope = max(0.0, self.step - self.lone_step) / max(1, self.rows - 1)
        return self.lone_step + slope * (rows - 1)

    def seconds(self, input_len: int, output_lens: Sequence[int]) -> float:
        """Seconds of a run: all prompts, then a step for each token of the longest output. output_lens: ascending."""
        total = len(output_lens) * input_len * self.prompt_token
        done = 1  # the step of a prompt computes the first token too
        for position, length in enumerate(output_lens):
            steps = max(0, length - done)
            total += steps * self.step_of(len(output_lens) - position)
            done += steps
        return total

    def all_runs(self, workload: Workload, num_modes: int, repeats: int) -> float:
        """Seconds of every mode's repeats and its warm-up."""
        warm_up = self.seconds(workload.input_len, [WARM_UP_TOKENS] * workload.num_requests)
        return num_modes * (repeats * self.seconds(workload.input_len, workload.sorted_output_lens) + warm_up)


def probe(run: RunPrompts, workload: Workload, vocab_size: int, mode: str) -> Pace | None:
    """Measure a mode with few requests of the workload, and with one alone; None on a rank that has no part in it."""
    few = replace(
        workload,
        num_prompts=min(PROBED_PROMPTS, workload.num_prompts),
        samples=min(PROBED_SAMPLES, workload.samples),
        input_len=min(PROBED_INPUT, workload.input_len),
        output_len=PROBED_TOKENS,
        tail=0.0,
    )
    for repeat in (PROBE - 1, PROBE):  # the first run warms up
        together = _run(run, few, vocab_size, mode, repeat)
    lone = _run(run, replace(few, num_prompts=1, samples=1), vocab_size, mode, PROBE - 2)
    if together is None or lone is None:
        return None
    prompts = max(0.0, together.seconds - (PROBED_TOKENS - 1) * together.tpot)
    return Pace(prompts / (few.num_requests * few.input_len), lone.tpot, together.tpot, few.num_requests)


def _run(run: RunPrompts, workload: Workload, vocab_size: int, mode: str, repeat: int) -> Sample | None:
    return run(workload.prompts(repeat, vocab_size, mode), workload.output_lens(repeat))


def fitted(workload: Workload, paces: Sequence[Pace], num_modes: int, repeats: int, seconds: float) -> Workload:
    """The largest of ever smaller workloads whose runs fit `seconds` at the slowest pace; the smallest if none does."""
    smaller: Workload | None = workload
    while smaller is not None:
        workload = smaller
        if max((pace.all_runs(workload, num_modes, repeats) for pace in paces), default=0.0) <= seconds:
            break
        smaller = workload.smaller()
    return workload
