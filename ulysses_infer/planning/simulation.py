"""Discrete-event simulation of replicas behind the router, in virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ulysses_infer.bench.serve.traces import TraceRow
from ulysses_infer.engine.request import Request
from ulysses_infer.errors import RequestError
from ulysses_infer.planning.replica import SimulatedReplica


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
    replicas: Sequence[SimulatedReplica],
    request_seconds: float = 0.0,
    max_concurrency: int | None = None,
) -> SimulationResult:
    """Run all rows, in order of arrival, to their end; each goes to the replica with the least outstanding work.

    request_seconds: from arrival until the engine has the request. max_concurrency: further requests are sent when
    earlier ones end. The same inputs give the same result.
    """
    results: list[RequestResult] = []
    ends: list[tuple[float, int]] = []  # (time, replica) of running steps
    refused, number, latest = 0, 0, 0.0
    limit = len(rows) if max_concurrency is None else max_concurrency
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
            index = min(range(len(replicas)), key=lambda i: replicas[i].load) if len(replicas) > 1 else 0
            try:
                replicas[index].submit(rows[number], number, now, now - request_seconds)
            except RequestError:
                refused += 1
            number += 1
        if not replicas[index].is_busy:
            end = replicas[index].start(now)
            if end is not None:
                heapq.heappush(ends, (end, index))
    for replica in replicas:
        replica.scheduler.allocator.assert_idle()
    ended = max((result.arrived + result.latency for result in results), default=0.0)
    seconds = ended - (rows[0].at if results else 0.0)
    preemptions = sum(replica.scheduler.num_preemptions for replica in replicas)
    return SimulationResult(results, refused, seconds, preemptions)


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
