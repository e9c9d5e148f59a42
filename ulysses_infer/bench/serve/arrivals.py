"""Arrival times of requests: gamma-distributed gaps at a constant or changing rate.

With a changing rate, the arrivals of a unit-rate process are mapped through the inverse of the expected number of
requests up to a time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice


@dataclass(frozen=True)
class Rate:
    """A constant rate in requests per second; infinite: all at once."""

    per_second: float = math.inf

    def moment(self, count: float) -> float:
        """The time by which `count` requests are expected."""
        return count / self.per_second


@dataclass(frozen=True)
class Ramp:
    """A rate that changes linearly or exponentially in time until `num_requests` have arrived."""

    start: float
    end: float
    num_requests: int
    is_exponential: bool = False

    @property
    def _is_curved(self) -> bool:
        return self.is_exponential and not math.isclose(self.start, self.end, rel_tol=1e-6)

    @property
    def seconds(self) -> float:
        """Duration of the ramp."""
        if self._is_curved:
            return self.num_requests * math.log(self.end / self.start) / (self.end - self.start)
        return 2 * self.num_requests / (self.start + self.end)

    def moment(self, count: float) -> float:
        """The time by which `count` requests are expected; after the ramp the rate is constant."""
        if count == 0:
            return 0.0
        if count >= self.num_requests:
            return self.seconds + (count - self.num_requests) / self.end
        if self._is_curved:
            growth = math.log(self.end / self.start) / self.seconds
            return math.log1p(count * growth / self.start) / growth
        slope = (self.end - self.start) / self.seconds
        return 2 * count / (self.start + math.sqrt(max(0.0, self.start**2 + 2 * slope * count)))


def unit_arrivals(burstiness: float, draw: random.Random) -> Iterator[float]:
    """An endless series of arrivals at rate 1, the first at 0. Gaps are gamma-distributed with shape `burstiness`.

    1 is a Poisson process, less is burstier, infinite gives equal gaps.
    """
    now = 0.0
    while True:
        yield now
        now += 1.0 if math.isinf(burstiness) else draw.gammavariate(burstiness, 1 / burstiness)


def arrival_times(count: int, rate: Rate | Ramp, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which each of `count` requests is to be sent, in order."""
    arrivals = unit_arrivals(burstiness, random.Random(f"arrivals/{seed}"))
    return [rate.moment(position) for position in islice(arrivals, count)]
