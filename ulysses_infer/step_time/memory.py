"""The latest measured steps of one mode, by bucket."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ulysses_infer.step_time.step_shape import FEATURES, Bucket

PER_BUCKET = 8
ASSUMED_WEIGHT = 0.05  # weight of an estimated time


class Memory:
    """Feature rows and seconds, at most `PER_BUCKET` per bucket; a new one replaces the oldest.

    Nothing is forgotten for lack of traffic, unlike with a decay over time: a thousand decodes leave the measurements
    of prefills in place.
    """

    def __init__(self) -> None:
        self._rows = np.zeros((0, len(FEATURES)))
        self._seconds, self._weights = np.ones(0), np.zeros(0)  # weight 0: unused
        self._written = np.zeros(0, dtype=np.int64)
        self._places: dict[Bucket, int] = {}
        self._counts: dict[Bucket, int] = {}
        self._has_assumed = False

    def add(self, bucket: Bucket, row: Sequence[float], seconds: float, time: int, assumed: bool = False) -> None:
        """Remember a step at `time`, a count of steps. Estimated ones (`assumed`) get little weight."""
        place = self._places.setdefault(bucket, len(self._places) * PER_BUCKET)
        if place == len(self._seconds):
            self._grow()
        count = self._counts.get(bucket, 0)
        index = place + count % PER_BUCKET
        self._counts[bucket] = count + 1
        self._rows[index], self._seconds[index], self._written[index] = row, seconds, time
        self._weights[index] = ASSUMED_WEIGHT if assumed else 1.0
        self._has_assumed |= assumed

    def all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows [n, F], seconds [n], weights [n])"""
        known = self._weights > 0
        return self._rows[known], self._seconds[known], self._weights[known]

    def of(self, bucket: Bucket) -> tuple[np.ndarray, np.ndarray, int]:
        """(rows [k, F], seconds [k], latest time) of the measured steps of a bucket, k at most `PER_BUCKET`."""
        place = self._places.get(bucket)
        if place is None:
            return self._rows[:0], self._seconds[:0], 0
        count = self._counts[bucket]
        own = slice(place, place + min(count, PER_BUCKET))
        latest = int(self._written[place + (count - 1) % PER_BUCKET])
        if not self._has_assumed:
            return self._rows[own], self._seconds[own], latest
        known = self._weights[own] == 1.0
        return self._rows[own][known], self._seconds[own][known], latest

    def scale(self, factor: float, before: int) -> None:
        """The machine's speed has changed: what was remembered before `time` now takes `factor` times as long."""
        self._seconds[self._written < before] *= factor

    def _grow(self) -> None:
        places = max(8 * PER_BUCKET, len(self._seconds))
        self._rows = np.concatenate([self._rows, np.zeros((places, len(FEATURES)))])
        self._seconds = np.concatenate([self._seconds, np.ones(places)])
        self._weights = np.concatenate([self._weights, np.zeros(places)])
        self._written = np.concatenate([self._written, np.zeros(places, dtype=np.int64)])
