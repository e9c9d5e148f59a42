"""The step time model: fitted to measured steps, refined by every step that runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import mul
from statistics import median
from typing import NamedTuple

import numpy as np

from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.drift import DriftDetector
from ulysses_infer.step_time.memory import Memory
from ulysses_infer.step_time.regression import fit_coefficients
from ulysses_infer.step_time.step_shape import BREAKPOINTS, FEATURES, NUM_SHARED, Bucket, StepShape

STEPS_PER_FIT = 64
PROOF = 0.1  # attention is slower in a mode only if that explains this share of the time of steps with attention
LEAST_SECONDS = 1e-6
CORRECTION_EACH = math.log(1.25)  # each step of a kind may change its prediction by up to another quarter
FRESH_STEPS = 2000  # the half-life of a correction: a mode that had bad luck gets another chance


class Measurement(NamedTuple):
    """A step of a shape and the time it took in a mode."""

    mode: Mode
    shape: StepShape
    seconds: float


class StepTimeModel:
    """Predicts the time of a step in every mode.

    The prediction is a linear model, coefficients times features (`StepShape.features`), times a correction from the
    latest steps of the same kind. The coefficients are fitted to all remembered steps of all modes. When the whole
    machine changes speed, the remembered steps of all modes are rescaled: only measuring a mode can tell that
    it has changed more than the others.
    """

    def __init__(self, modes: Sequence[Mode]) -> None:
        self.modes = tuple(modes)
        self.drift = DriftDetector()
        self._memories = [Memory() for _ in modes]
        self._coefficients = np.zeros((len(modes), len(FEATURES)))
        self._anchor = (
            self._coefficients.copy()
        )  # the reference for drift: the coefficients before traffic refined them
        self._factors: list[list[float]] = self._coefficients.tolist()  # the same as numbers of Python: see `predict`
        self._fitted: np.ndarray | None = None
        self._offsets: dict[tuple[int, Bucket], tuple[float, int, int]] = {}  # cached results of `_offset`
        self._most_tokens: dict[bool, int] = {}  # of what it started from, by whether the step has prompts
        self._steps = 0
        self._steps_to_fit = STEPS_PER_FIT

    # -- learning ----------------------------------------------------------------------------------------------

    def learn(self, measurements: Iterable[Measurement], assumed: bool = False) -> None:
        """Start from these measurements, or from `assumed` ones that the first measurements overrule."""
        self._memories, self._most_tokens = [Memory() for _ in self.modes], {}
        for mode, shape, seconds in measurements:
            self._remember(self.modes.index(mode), shape, seconds, assumed)
            has_prompts = shape.num_prefills > 0
            self._most_tokens[has_prompts] = max(shape.num_tokens, self._most_tokens.get(has_prompts, 0))
        self._fitted = None
        self._fit()
        self._anchor = self._coefficients.copy()

    def observe(self, mode: Mode, shape: StepShape, seconds: float) -> None:
        """Learn from a step. Times that are not positive and finite are ignored."""
        if not (seconds > 0 and math.isfinite(seconds)):
            return
        self._steps += 1
        index = self.modes.index(mode)
        self._look_for_drift(index, shape, seconds)
        self._remember(index, shape, seconds)
        self._steps_to_fit -= 1
        if self._steps_to_fit <= 0:
            self._fit()

    def _remember(self, index: int, shape: StepShape, seconds: float, assumed: bool = False) -> None:
        bucket = shape.bucket
        self._memories[index].add(bucket, shape.features(), max(seconds, LEAST_SECONDS), self._steps, assumed)
        self._offsets.pop((index, bucket), None)

    def _fit(self) -> None:
        """Fit all modes together: each has its own coefficients, except for attention, where it may only be slower."""
        self._steps_to_fit = STEPS_PER_FIT
        known = [memory.all() for memory in self._memories]
        seconds = np.concatenate([seconds for _, seconds, _ in known])
        if not len(seconds):
            return
        weights = np.concatenate([weights for _, _, weights in known])
        width, own = len(FEATURES), len(FEATURES) * len(self.modes)
        rows = np.zeros((len(seconds), own + NUM_SHARED))
        proof = np.zeros(own + NUM_SHARED)
        first = 0
        for index, (part, _, _) in enumerate(known):
            last, start = first + len(part), index * width
            rows[first:last, start : start + width] = part
            rows[first:last, own:] = part[:, -NUM_SHARED:]
            proof[start + width - NUM_SHARED : start + width] = PROOF
            first = last
        self._offsets.clear()
        self._fitted = fit_coefficients(rows, seconds, weights, proof, self._fitted)
        self._coefficients = self._fitted[:own].reshape(len(self.modes), width).copy()
        self._coefficients[:, -NUM_SHARED:] += self._fitted[own:]
        for coefficients, (part, _, _) in zip(self._coefficients, known, strict=True):
            _extrapolate(coefficients, part)
        self._factors = self._coefficients.tolist()

    def _look_for_drift(self, index: int, shape: StepShape, seconds: float) -> None:
        kind, expected = (index, shape.bucket), float(np.dot(self._anchor[index], shape.features()))
        if expected <= 0:
            return
        if not self.drift.knows(kind):
            rows, known, _ = self._memories[index].of(shape.bucket)
            if len(known):
                self.drift.set_usual(kind, _level(rows, known, self._anchor[index]))
        is_extrapolated = shape.num_tokens > self._most_tokens.get(shape.num_prefills > 0, 0)
        change = self.drift.add(kind, math.log(seconds / expected), self._steps, is_extrapolated)
        if change is not None:
            self._rescale(*change)

    def _rescale(self, factor: float, since: int) -> None:
        self._anchor = self._anchor * factor
        for memory in self._memories:
            memory.scale(factor, since)
        self._fitted = None
        self._fit()

    # -- predicting --------------------------------------------------------------------------------------------

    def predict(self, shape: StepShape) -> tuple[float, ...]:
        """Seconds of a step in each of `modes`; always positive and finite."""
        bucket, features = shape.bucket, shape.features()
        # Between steps, caches are cold: a few numbers take numpy several times as long as Python.
        expected = [sum(map(mul, factors, features)) for factors in self._factors]
        return tuple(
            [max(seconds, LEAST_SECONDS) * self._correction(index, bucket) for index, seconds in enumerate(expected)]
        )

    def is_measured(self, mode: Mode, shape: StepShape) -> bool:
        """Whether a step of this kind was ever measured in `mode`."""
        return self._offset_of(self.modes.index(mode), shape.bucket)[1] > 0

    def coefficients(self, mode: Mode) -> dict[str, float]:
        """Seconds per unit of each feature."""
        return dict(zip(FEATURES, self._coefficients[self.modes.index(mode)].tolist(), strict=True))

    def _correction(self, index: int, bucket: Bucket) -> float:
        """The correction of steps of this kind, closer to 1 the fewer and older they are."""
        middle, count, latest = self._offset_of(index, bucket)
        most = CORRECTION_EACH * count
        trust = count / (count + 1) * FRESH_STEPS / (FRESH_STEPS + self._steps - latest)
        return math.exp(max(-most, min(most, middle)) * trust)

    def _offset_of(self, index: int, bucket: Bucket) -> tuple[float, int, int]:
        """(median log of measured over modelled time, number of measurements, step of the latest) of a bucket."""
        key = index, bucket
        found = self._offsets.get(key)
        if found is None:
            found = self._offsets[key] = self._offset(*key)
        return found

    def _offset(self, index: int, bucket: Bucket) -> tuple[float, int, int]:
        rows, seconds, latest = self._memories[index].of(bucket)
        if not len(seconds):
            return 0.0, 0, latest
        return _level(rows, seconds, self._coefficients[index]), len(seconds), latest


def _extrapolate(coefficients: np.ndarray, rows: np.ndarray) -> None:
    """One more token costs as much beyond the longest measured step as just below it, instead of nothing.

    coefficients: [F], of a mode; rows: [n, F], its measured steps.
    """
    for knot in range(2, 1 + len(BREAKPOINTS)):  # after the constant and the first tokens
        if not rows[:, knot].any():
            coefficients[knot] = coefficients[knot - 1]


def _level(rows: np.ndarray, seconds: np.ndarray, coefficients: np.ndarray) -> float:
    """Median log of measured over modelled time."""
    levels: list[float] = np.log(seconds / _positive(rows @ coefficients)).tolist()
    return median(levels)  # of a few values: numpy's median would take most of a prediction


def _positive(seconds: np.ndarray) -> np.ndarray:
    return np.maximum(seconds, LEAST_SECONDS)
