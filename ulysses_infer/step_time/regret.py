"""Regret: what the mode choices have cost, compared with the best mode in hindsight."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np

from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.model import StepTimeModel
from ulysses_infer.step_time.step_shape import Bucket, StepShape

RECENT_ERRORS = 1024


class RegretTracker:
    """Counts steps by kind and mode. Regret is the time that the modes chosen take beyond the best one for each kind,
    as the model predicts them today: what it has learned since, from exploration above all, counts against it."""

    def __init__(self, model: StepTimeModel) -> None:
        self._model = model
        self._steps: dict[Bucket, np.ndarray] = {}
        self._sums: dict[Bucket, np.ndarray] = {}
        self._errors: deque[float] = deque(maxlen=RECENT_ERRORS)
        self._num_steps = self._num_others = self._num_faster = 0
        self._seconds = 0.0

    def count(self, shape: StepShape, mode: Mode, predicted: Mapping[Mode, float], seconds: float) -> None:
        """A step ran in `mode` for `seconds`."""
        bucket = shape.bucket
        if bucket not in self._steps:
            self._steps[bucket] = np.zeros(len(self._model.modes), dtype=np.int64)
            self._sums[bucket] = np.zeros(len(shape), dtype=np.int64)
        self._steps[bucket][self._model.modes.index(mode)] += 1
        self._sums[bucket] += shape
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
        mean = StepShape(*(round(total / int(steps.sum())) for total in self._sums[bucket].tolist()))
        times = np.array(self._model.predict(mean))
        return float(steps @ (times - times.min()))

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
