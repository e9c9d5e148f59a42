"""Bounded time windows and histograms of recent values."""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

BUCKETS_PER_OCTAVE = 8  # neighbours differ by 9 %, so a percentile is at most 4.5 % off
SMALLEST_SAMPLE = 1e-6


class TimeGridRow(Protocol):
    """What a `TimeGrid` keeps per time interval."""

    index: int
    """Which interval: it starts at `index * width` seconds on the monotonic clock."""
    changed: float
    """Time of the last change."""


R = TypeVar("R", bound=TimeGridRow)


class TimeGrid(Generic[R]):
    """The rows of the last `span` seconds, each of `width` seconds; intervals without events have no row.

    Rows are created in order of time; a late event counts in the newest one.
    """

    def __init__(self, width: float, span: float, make: Callable[[int], R]) -> None:
        self.width = width
        self._most = math.ceil(span / width)
        self._make = make
        self._rows: deque[R] = deque(maxlen=self._most + 1)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int, now: float) -> R:
        """The row to add an event to; marks it as changed at `now`."""
        if not self._rows or index > self._rows[-1].index:
            self._rows.append(self._make(index))
            while self._rows[0].index < index - self._most:
                self._rows.popleft()
        row = self._rows[-1]
        row.changed = max(row.changed, now)
        return row

    def groups(self, start: float, factor: int, since: float) -> Iterator[tuple[int, list[R]]]:
        """Rows from moment `start` on, in groups of `factor` rows that begin at multiples of it, newest group first.

        Stops at the first group that has not changed since `since`.
        """
        newest_first = itertools.takewhile(lambda row: (row.index + 1) * self.width > start, reversed(self._rows))
        for index, rows in itertools.groupby(newest_first, lambda row: row.index // factor):
            group = list(rows)
            if group[0].changed < since:
                return
            yield index, group


class Samples:
    """Durations counted in buckets of geometric width: adding is O(1), memory bounded by the range of sizes."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Count one sample."""
        self._counts[round(math.log2(max(seconds, SMALLEST_SAMPLE)) * BUCKETS_PER_OCTAVE)] += 1

    def merge(self, others: Iterable[Samples]) -> Samples:
        """Add the counts of `others`; returns itself."""
        for other in others:
            if other._counts:
                self._counts.update(other._counts)
        return self

    @property
    def count(self) -> int:
        """Number of samples."""
        return self._counts.total()

    def percentiles(self, shares: Iterable[float]) -> list[float | None]:
        """For each share from 0 to 1, in ascending order, the duration that this share of samples does not exceed."""
        total, passed, found = self.count, 0, []
        buckets = iter(sorted(self._counts.items()))
        bucket = 0
        for share in shares:
            while passed < max(1, math.ceil(share * total)) and passed < total:
                bucket, count = next(buckets)
                passed += count
            found.append(2 ** (bucket / BUCKETS_PER_OCTAVE) if total else None)
        return found
