"""How long the parts of a check of plan (`judge_plan_here`) take, and how large its requests are, by a machine's speed.

Errors of means and of 99th percentiles say something from about a hundred requests on. So a slow machine gets shorter
requests, not fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ulysses_infer.bench.compare.protocols import LONGEST_ANSWER, TRACE_SHARE
from ulysses_infer.bench.replay.scaling import Scale
from ulysses_infer.bench.serve.traces import TraceRow
from ulysses_infer.step_time.profile import Profile

SPEED_SHARE, CALIBRATION_SHARE, PROBES_SHARE, RUN_SHARE = 0.02, 0.2, 0.15, 0.11
"""Of all time: the first look at the machine, the profile, the probes of two modes, each of four runs. The rest is for
starts, and for requests that end after their run."""
NUM_REQUESTS = 100  # of a run, at half of the machine's speed
NUM_PROBES = 2  # modes
INPUT_LENS, OUTPUT_LENS, LONE, SATURATED = (16, 512), (8, 32), (2, 8), (8, 48)
SATURATED_SHARE = 0.7  # of the time of a probe
STEP_SECONDS = 1.0  # the longest step, unless it has `LEAST_BATCHED` tokens
LEAST_BATCHED = 128
SHORTEST_CONTEXT = 512


@dataclass(frozen=True)
class Speed:
    """What a short calibration saw, of the faster mode."""

    tokens_per_second: float
    """Of prompts."""
    decode_seconds: float
    """Of a step of one token."""

    @classmethod
    def of(cls, profile: Profile) -> Speed:
        """The speed in a profile, however short its measurement was."""
        steps = profile.measurements
        speed = max(step.shape.num_tokens / step.seconds for step in steps)
        return cls(speed, min(step.seconds for step in steps))


@dataclass(frozen=True)
class CheckSizes:
    """The sizes of one check. Lengths are means, in tokens."""

    input_len: int
    output_len: int
    num_lone: int
    """Requests one after another in a probe."""
    num_saturated: int
    """Requests at once in a probe."""
    max_num_batched_tokens: int
    calibration_seconds: float
    run_seconds: float
    """From the first to the last arrival of a run."""

    @property
    def threshold(self) -> int:
        """Tokens of the threshold policy: it uses both modes."""
        return self.max_num_batched_tokens // 4

    @classmethod
    def of(cls, speed: Speed, minutes: float, most_batched: int) -> CheckSizes:
        """Sizes with which a check ends within about so many minutes. most_batched: tokens of a step that suffice."""
        seconds = 60 * minutes
        tokens = TRACE_SHARE * speed.tokens_per_second * RUN_SHARE * seconds / NUM_REQUESTS
        output_len = _within(OUTPUT_LENS, tokens / 6)
        input_len = _within(INPUT_LENS, tokens - output_len)
        probe = PROBES_SHARE * seconds / NUM_PROBES
        saturated = SATURATED_SHARE * probe * speed.tokens_per_second / (input_len + output_len)
        lone = input_len / speed.tokens_per_second + output_len * speed.decode_seconds
        batched = 1 << max(0, int(STEP_SECONDS * speed.tokens_per_second).bit_length() - 1)
        return cls(
            input_len,
            output_len,
            _within(LONE, (1 - SATURATED_SHARE) * probe / lone),
            _within(SATURATED, saturated),
            min(most_batched, max(LEAST_BATCHED, batched)),
            CALIBRATION_SHARE * seconds,
            RUN_SHARE * seconds,
        )

    def scaled(self, rows: Sequence[TraceRow], longest: int) -> tuple[list[TraceRow], float]:
        """The requests of a trace with lengths of these means, of at most `longest` tokens, and their prompt tokens per
        hash id. Prompts and answers are scaled each by a factor of its own."""
        most = min(LONGEST_ANSWER * self.output_len, longest // 2)
        inputs = Scale(length=_factor(self.input_len, [row.input_len for row in rows]), max_input_len=longest - most)
        outputs = Scale(length=_factor(self.output_len, [row.output_len for row in rows]), max_output_len=most)
        pairs = zip(inputs.apply(rows), outputs.apply(rows), strict=True)
        return [replace(own, output_len=other.output_len) for own, other in pairs], inputs.block_tokens


def context_of(rows: Sequence[TraceRow]) -> int:
    """A power of two that every request fits in."""
    longest = max(row.input_len + row.output_len for row in rows)
    return max(SHORTEST_CONTEXT, 1 << (longest - 1).bit_length())


def _factor(length: int, lengths: Sequence[int]) -> float:
    return min(1.0, length / max(1.0, fmean(lengths)))


def _within(limits: tuple[int, int], value: float) -> int:
    return min(limits[1], max(limits[0], round(value)))
