"""When the machine itself has become slower or faster, as opposed to the model being wrong about some steps."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW = 16
AGREEING = 14  # of the window's steps must be off to the same side
LEAST_CHANGE = math.log(1.1)
SLOWNESS = 1 / 64  # how fast the usual level of a kind of step follows what is measured


class DriftDetector:
    """Compares every step with what steps of its kind usually take, and notices when nearly all are off alike.

    A sign test over the last `WINDOW` steps, so that no single outlier, however wild, counts for more than one.
    """

    def __init__(self) -> None:
        self.changes = 0
        """Since the start."""
        self._usual: dict[object, float] = {}
        self._window: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def set_usual(self, kind: object, level: float) -> None:
        """The logarithm of measured over expected time that is normal for a kind of step: what the model misses."""
        self._usual[kind] = level

    def knows(self, kind: object) -> bool:
        """Whether a usual level is known."""
        return kind in self._usual

    def add(self, kind: object, level: float, time: int) -> tuple[float, int] | None:
        """Take in a step at `time`; on a change, (how many times slower it is now, since which step)."""
        usual = self._usual.setdefault(kind, level)
        self._window.append((time, level - usual))
        self._usual[kind] = usual + SLOWNESS * max(-1.0, min(1.0, level - usual))
        offsets = [offset for _, offset in self._window]
        middle = median(offsets)
        agreeing = sum((offset > 0) == (middle > 0) and abs(offset) > LEAST_CHANGE / 2 for offset in offsets)
        if len(offsets) < WINDOW or agreeing < AGREEING or abs(middle) < LEAST_CHANGE:
            return None
        since = self._window[0][0]
        self._window.clear()
        self.changes += 1
        return math.exp(middle), since
