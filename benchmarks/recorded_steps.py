"""Step times of runs that were recorded: the clock of a simulation that is to err in nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from statistics import median

import numpy as np

from ulysses_infer.bench.compare.findings import ContenderRun
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.step_shape import StepShape

LONGEST_GAP = 0.02  # seconds; after longer ones the engine had nothing to do
BINS_PER_DOUBLING = 2


class RecordedStepTimes:
    """Interpolates, over the number of tokens, the mean times of steps with and without prompts in each mode.

    A step's time lasts to the start of the next one, so that it includes what the host does in between.
    """

    def __init__(self, runs: Sequence[ContenderRun], request_seconds: float) -> None:
        self.request_seconds = request_seconds
        bins: dict[tuple[Mode, bool], dict[int, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
        for mode, tokens, has_prompt, seconds in _steps(runs):
            number = round(BINS_PER_DOUBLING * np.log2(tokens))
            bins[mode, has_prompt][number].append((tokens, seconds))
        self.modes = tuple(dict.fromkeys(mode for mode, _ in bins))
        self._means = {
            kind: np.array([np.mean(own[number], axis=0) for number in sorted(own)]).T for kind, own in bins.items()
        }

    def seconds(self, mode: Mode, shape: StepShape, is_ahead: bool = True) -> float:
        """See `StepTimes`."""
        kind = mode, shape.num_prefills > 0
        tokens, seconds = self._means[kind if kind in self._means else (mode, not kind[1])]
        return float(np.interp(shape.num_tokens, tokens, seconds))


def host_gaps(runs: Iterable[ContenderRun]) -> list[float]:
    """Seconds between the end of a step and the start of the next, where one followed at once."""
    gaps = [after.start - before.start - before.seconds for run in runs for before, after in pairwise(run.steps)]
    return [gap for gap in gaps if 0 <= gap < LONGEST_GAP] or [0.0]


def _steps(runs: Sequence[ContenderRun]) -> Iterator[tuple[Mode, int, bool, float]]:
    gap = median(host_gaps(runs))
    for run in runs:
        for step, after in pairwise(run.steps):
            own_gap = after.start - step.start - step.seconds
            seconds = step.seconds + (own_gap if 0 <= own_gap < LONGEST_GAP else gap)
            yield Mode(step.sp, step.tp), step.tokens, step.tokens > step.decodes, seconds
