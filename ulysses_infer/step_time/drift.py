"""Detects when the machine itself has become slower or faster."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

WINDOW = 16
AGREEING = 14  # of the window's steps must be off to the same side
LEAST_CHANGE = math.log(1.1)
MOST_BIAS = math.log(1.25)  # what the model may be off by for a kind of step that was never measured
SLOWNESS = 1 / 64  # how fast the usual level of a kind of step follows what is measured


@dataclass
class _Usual:
    """The level that is normal for a kind of step."""

    level: float
    is_measured: bool
    """Whether it comes from steps measured before; else it is what its first steps showed, as far as plausible."""
    count: int = 1

    def follow(self, level: float) -> None:
        self.count += 1
        if self.is_measured:
            self.level += SLOWNESS * _within(level - self.level, 1.0)
        else:
            self.level += max(SLOWNESS, 1 / self.count) * (_within(level, MOST_BIAS) - self.level)


class _Step(NamedTuple):
    time: int
    offset: float
    """How far it is from the usual level of its kind."""
    shift: float
    """The same, or from what the model expects where nothing was measured before."""


class DriftDetector:
    """Compares every step with what steps of its kind usually take, and notices when nearly all are off alike.

    A *level* is the logarithm of measured over expected time. A sign test over the last `WINDOW` steps, so that no
    single outlier, however wild, counts for more than one.
    """

    def __init__(self) -> None:
        self.changes = 0
        """Since the start."""
        self._usual: dict[object, _Usual] = {}
        self._window: deque[_Step] = deque(maxlen=WINDOW)

    def set_usual(self, kind: object, level: float) -> None:
        """The level that steps of a kind measured before have."""
        self._usual[kind] = _Usual(level, is_measured=True)

    def knows(self, kind: object) -> bool:
        """Whether a usual level is known."""
        return kind in self._usual

    def add(self, kind: object, level: float, time: int) -> tuple[float, int] | None:
        """Take in a step at `time`; on a change, (how many times slower it is now, since which step)."""
        usual = self._usual.setdefault(kind, _Usual(_within(level, MOST_BIAS), is_measured=False))
        offset = level - usual.level
        self._window.append(_Step(time, offset, offset if usual.is_measured else level))
        usual.follow(level)
        return self._judge()

    def _judge(self) -> tuple[float, int] | None:
        middle = median(step.offset for step in self._window)
        agreeing = sum(step.offset * middle > 0 and abs(step.offset) > LEAST_CHANGE / 2 for step in self._window)
        if agreeing < AGREEING or abs(middle) < LEAST_CHANGE:
            return None
        change, since = math.exp(median(step.shift for step in self._window)), self._window[0].time
        self._window.clear()
        self._usual = {kind: usual for kind, usual in self._usual.items() if usual.is_measured}
        self.changes += 1
        return change, since


def _within(value: float, limit: float) -> float:
    return max(-limit, min(limit, value))
