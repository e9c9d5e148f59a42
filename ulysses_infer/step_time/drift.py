"""Detects when the machine itself has become slower or faster."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

WINDOW = 16
AGREEING = 14  # steps of the window that must deviate to the same side
LEAST_CHANGE = math.log(1.1)
MOST_BIAS = math.log(1.25)  # how far the model may be off for a kind of step that was never measured
SLOWNESS = 1 / 64  # how fast the usual level of a kind of step follows the measurements


@dataclass
class _Usual:
    """The usual level of a kind of step."""

    level: float
    is_measured: bool
    """Whether it comes from measured steps; otherwise from the first steps seen, as far as plausible."""
    most_bias: float = MOST_BIAS
    """How far the model may be off, if nothing was measured."""
    count: int = 1

    def follow(self, level: float) -> None:
        self.count += 1
        if self.is_measured:
            self.level += SLOWNESS * _within(level - self.level, 1.0)
        else:
            self.level += max(SLOWNESS, 1 / self.count) * (_within(level, self.most_bias) - self.level)


class _Step(NamedTuple):
    time: int
    offset: float
    """Deviation from the usual level of its kind."""
    shift: float
    """The same, or the deviation from the model's expectation where that is better known."""


class DriftDetector:
    """Compares every step with the usual level of its kind, and detects when nearly all deviate to the same side.

    A *level* is the logarithm of measured over expected time. The detector is a sign test over the last `WINDOW` steps,
    so each outlier counts once, however large.
    """

    def __init__(self) -> None:
        self.changes = 0
        """Changes since the start."""
        self._usual: dict[object, _Usual] = {}
        self._window: deque[_Step] = deque(maxlen=WINDOW)

    def set_usual(self, kind: object, level: float) -> None:
        """Set the usual level of a measured kind of step."""
        self._usual[kind] = _Usual(level, is_measured=True)

    def knows(self, kind: object) -> bool:
        """Whether a usual level is known."""
        return kind in self._usual

    def add(self, kind: object, level: float, time: int, is_extrapolated: bool = False) -> tuple[float, int] | None:
        """Add a step at `time`; on a change returns (how many times slower the machine is now, since which step).

        is_extrapolated: whether it is larger than all that was measured, so that only its own kind tells what is usual.
        """
        most_bias = math.inf if is_extrapolated else MOST_BIAS
        usual = self._usual.setdefault(kind, _Usual(_within(level, most_bias), False, most_bias))
        offset = level - usual.level
        self._window.append(_Step(time, offset, offset if usual.is_measured or is_extrapolated else level))
        usual.follow(level)
        return self._judge()

    def _judge(self) -> tuple[float, int] | None:
        offsets = [step.offset for step in self._window]
        slower = sum([offset > LEAST_CHANGE / 2 for offset in offsets])
        faster = sum([offset < -LEAST_CHANGE / 2 for offset in offsets])
        if max(slower, faster) < AGREEING or abs(median(offsets)) < LEAST_CHANGE:
            return None
        change, since = math.exp(median(step.shift for step in self._window)), self._window[0].time
        self._window.clear()
        self._usual = {kind: usual for kind, usual in self._usual.items() if usual.is_measured}
        self.changes += 1
        return change, since


def _within(value: float, limit: float) -> float:
    return max(-limit, min(limit, value))
