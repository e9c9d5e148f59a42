"""Regret: what the mode choices have cost, compared with the best mode in hindsight."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.model import StepTimeModel
from ulysses_infer.step_time.step_shape import Bucket, StepShape

RECENT_ERRORS = 1024


class RegretTracker:
    """Counts steps by kind and mode. Regret is the time that the modes chosen take beyond the best one for each kind,
    as the model predicts them today: what it has learned since, from exploration above all, counts against it."""

    def __init__(self, model: StepTimeModel) -> None:
        self._model = model
        self._steps: dict[Bucket, list[int]] = {}  # by mode
        self._sums: dict[Bucket, Sequence[int]] = {}  # of shapes
        self._errors: deque[float] = deque(maxlen=RECENT_ERRORS)
        self._num_steps = self._num_others = self._num_faster = 0
        self._seconds = 0.0

    def count(self, shape: StepShape, mode: Mode, predicted: Mapping[Mode, float], seconds: float) -> None:
        """A step ran in `mode` for `seconds`."""
        bucket = shape.bucket
        if bucket not in self._steps:
            self._steps[bucket] = [0] * len(self._model.modes)
            self._sums[bucket] = [0] * len(shape)
        self._steps[bucket][self._model.modes.index(mode)] += 1
        self._sums[bucket] = [total + own for total, own in zip(self._sums[bucket], shape, strict=True)]
        self._num_steps += 1
        self._seconds += seconds
        self._errors.append(abs(predicted[mode] / seconds - 1))
        best = min(predicted.values())
        if predicted[mode] > best:
            self._num_others += 1
            self._num_faster += seconds < best

    def regret_seconds(self) -> float:
        """Time lost so far; never below zero."""
        return sum(self._regret_of(bucket) for bucket in self._steps)

    def _regret_of(self, bucket: Bucket) -> float:
        steps = self._steps[bucket]
        mean = StepShape(*(round(total / sum(steps)) for total in self._sums[bucket]))
        times = self._model.predict(mean)
        return sum(count * (seconds - min(times)) for count, seconds in zip(steps, times, strict=True))

    def stats(self) -> dict[str, Any]:
        """Plain values: steps, median prediction error, regret and what trying other modes showed."""
        regret = self.regret_seconds()
        return {
            "steps": self._num_steps,
            "median_prediction_error": median(self._errors) if self._errors else None,
            "regret_seconds": regret,
            "regret_share": regret / self._seconds if self._seconds else 0.0,
            "explored_steps": self._num_others,
            "explored_faster": self._num_faster,
        }
