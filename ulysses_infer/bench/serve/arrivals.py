"""Arrival times of requests: gamma-distributed gaps at a rate that may ramp.

A ramp is the same process on a warped clock: after t seconds the rate has let `expected(t)` requests through, so the
moment at which an arrival of a unit-rate process falls due is the inverse of that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice


@dataclass(frozen=True)
class Rate:
    """Requests per second, constant: infinite means all at once."""

    per_second: float = math.inf

    def moment(self, count: float) -> float:
        """When `count` requests are expected to have come."""
        return count / self.per_second


@dataclass(frozen=True)
class Ramp:
    """A rate that goes from one value to another while `num_requests` come, in equal steps or in equal ratios."""

    start: float
    end: float
    num_requests: int
    is_exponential: bool = False

    @property
    def _is_curved(self) -> bool:
        return self.is_exponential and not math.isclose(self.start, self.end, rel_tol=1e-6)

    @property
    def seconds(self) -> float:
        """How long the ramp takes."""
        if self._is_curved:
            return self.num_requests * math.log(self.end / self.start) / (self.end - self.start)
        return 2 * self.num_requests / (self.start + self.end)

    def moment(self, count: float) -> float:
        """When `count` requests are expected to have come; past the end of the ramp the rate stays."""
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
    """Arrivals of rate 1 without end, the first at 0. Gaps are gamma-distributed with shape `burstiness`.

    1 is a Poisson process, less comes in bursts, infinite is a metronome.
    """
    now = 0.0
    while True:
        yield now
        now += 1.0 if math.isinf(burstiness) else draw.gammavariate(burstiness, 1 / burstiness)


def arrival_times(count: int, rate: Rate | Ramp, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which each of `count` requests is to be sent, in order."""
    arrivals = unit_arrivals(burstiness, random.Random(f"arrivals/{seed}"))
    return [rate.moment(position) for position in islice(arrivals, count)]
