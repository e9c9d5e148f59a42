"""Discrete-event simulation of a fleet: replicas behind the router, in virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ulysses_infer.bench.serve.traces import TraceRow
from ulysses_infer.engine.request import Request
from ulysses_infer.errors import RequestError
from ulysses_infer.planning.replica import SimulatedReplica

NUM_REPORTS = 100  # of the progress of one simulation
Load = tuple[int, float]
"""`SimulatedReplica.load`."""
IDLE: Load = (0, 0.0)
SPARE_ENTRIES = 64  # outdated entries that are kept, beside as many as there are replicas


class Fleet:
    """`count` equal replicas. `replicas` has those that `least_loaded` has chosen at least once."""

    def __init__(self, count: int, make: Callable[[], SimulatedReplica]) -> None:
        self.replicas: list[SimulatedReplica] = []
        self._count, self._make = count, make
        self._loads: list[Load] = []
        self._by_load: list[tuple[Load, int]] = []  # a heap; entries whose load is not that of the replica are outdated

    def least_loaded(self) -> int:
        """The replica with the least load, of equal ones the first. Every later change of its load must be told."""
        while self._by_load and self._is_outdated(self._by_load[0]):
            heapq.heappop(self._by_load)
        is_spare_better = not self._by_load or self._by_load[0][0] > IDLE
        if is_spare_better and len(self.replicas) < self._count:
            self.replicas.append(self._make())
            self._loads.append(IDLE)
            heapq.heappush(self._by_load, (IDLE, len(self.replicas) - 1))
            return len(self.replicas) - 1
        return self._by_load[0][1]

    def update(self, index: int) -> None:
        """The load of a replica may have changed."""
        load = self.replicas[index].load
        if self._count == 1 or load == self._loads[index]:
            return
        self._loads[index] = load
        heapq.heappush(self._by_load, (load, index))
        if len(self._by_load) > 2 * len(self._loads) + SPARE_ENTRIES:
            self._by_load = [(load, index) for index, load in enumerate(self._loads)]
            heapq.heapify(self._by_load)

    def _is_outdated(self, entry: tuple[Load, int]) -> bool:
        load, index = entry
        return self._loads[index] != load


@dataclass(frozen=True)
class RequestResult:
    """One request's times in seconds."""

    arrived: float
    ttft: float
    """From arrival to the first token."""
    latency: float
    """From arrival to the last token."""
    input_len: int
    output_len: int
    cached_tokens: int

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first; 0 for a single token."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else 0.0


@dataclass(frozen=True)
class SimulationResult:
    """What one layout and policy did with the workload."""

    requests: list[RequestResult]
    num_refused: int
    """Requests that the cache can never hold."""
    seconds: float
    """Virtual time from the first arrival to the last token."""
    num_preemptions: int


def simulate(
    rows: Sequence[TraceRow],
    fleet: Fleet,
    request_seconds: float = 0.0,
    max_concurrency: int | None = None,
    report: Callable[[float], None] | None = None,
) -> SimulationResult:
    """Run all rows, in order of arrival, to their end; each goes to the replica with the least outstanding work.

    request_seconds: from arrival until the engine has the request. max_concurrency: further requests are sent when
    earlier ones end. report: called now and then with the share of requests that have ended. The same inputs give the
    same result.
    """
    results: list[RequestResult] = []
    ends: list[tuple[float, int]] = []  # (time, replica) of running steps
    refused, number, latest = 0, 0, 0.0
    limit = len(rows) if max_concurrency is None else max_concurrency
    replicas, reported = fleet.replicas, 0
    while number < len(rows) or ends:
        may_send = number < len(rows) and number - refused - len(results) < limit
        arrival = max(rows[number].at, latest) + request_seconds if may_send else float("inf")
        if ends and ends[0][0] <= arrival:
            now, index = heapq.heappop(ends)
            finished = replicas[index].finish(now)
            results += [_result(request, now) for request in finished]
            latest = now if finished and max_concurrency is not None else latest
        else:
            now = arrival
            index = fleet.least_loaded()
            try:
                replicas[index].submit(rows[number], number, now, now - request_seconds)
            except RequestError:
                refused += 1
            number += 1
        if not replicas[index].is_busy:
            end = replicas[index].start(now)
            if end is not None:
                heapq.heappush(ends, (end, index))
        fleet.update(index)
        if report is not None and len(results) >= reported + len(rows) / NUM_REPORTS:
            reported = len(results)
            report(reported / len(rows))
    seconds = max((each.arrived + each.latency for each in results), default=rows[0].at) - rows[0].at
    return SimulationResult(results, refused, seconds, _num_preemptions(replicas))


def _num_preemptions(replicas: Sequence[SimulatedReplica]) -> int:
    """Of replicas that have ended all requests; AssertionError if one holds blocks."""
    for replica in replicas:
        replica.scheduler.allocator.assert_idle()
    return sum(replica.scheduler.num_preemptions for replica in replicas)


def _result(request: Request, now: float) -> RequestResult:
    assert request.first_token_time is not None
    return RequestResult(
        arrived=request.arrival_time,
        ttft=request.first_token_time - request.arrival_time,
        latency=now - request.arrival_time,
        input_len=request.num_prompt_tokens,
        output_len=request.num_output_tokens,
        cached_tokens=request.num_cached_tokens,
    )
