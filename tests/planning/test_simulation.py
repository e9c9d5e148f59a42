"""The simulation drives the engine's scheduler, pools and policies; every request ends and every block returns."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planning.plans import arrivals, burst, planner
from ulysses_infer.bench.serve.traces import TraceRow
from ulysses_infer.config import SchedulerConfig
from ulysses_infer.engine.policies import StaticPolicy
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.planner import Candidate
from ulysses_infer.planning.replica import ReplicaSettings, SimulatedReplica
from ulysses_infer.planning.simulation import Fleet, simulate
from ulysses_infer.step_time.step_shape import StepShape

LONE = Mode(1, 1)


class LinearTimes:
    """A step takes a millisecond, and as much per hundred tokens."""

    modes = (LONE,)
    request_seconds = 0.002

    def seconds(self, mode: Mode, shape: StepShape, is_ahead: bool = True) -> float:
        return 1e-3 + 1e-5 * shape.num_tokens


def replica(num_blocks: int = 64, **scheduler: int) -> SimulatedReplica:
    limits = SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 64, **scheduler})
    return SimulatedReplica(ReplicaSettings(limits, num_blocks, 16, 1024), LinearTimes(), StaticPolicy(LONE))


@settings(max_examples=25, deadline=None)
@given(arrivals(200, 40), st.integers(1, 3), st.integers(16, 80))
def test_every_request_ends_with_its_length_and_every_block_returns(rows, count, num_blocks):
    fleet = Fleet(count, lambda: replica(num_blocks))
    result = simulate(rows, fleet, 0.002)
    assert len(result.requests) + result.num_refused == len(rows)
    assert all(request.latency >= request.ttft > 0 for request in result.requests)
    assert sum(request.output_len for request in result.requests) <= sum(row.output_len for row in rows)
    assert all(each.scheduler.allocator.num_used == 0 for each in fleet.replicas)


@settings(max_examples=10, deadline=None)
@given(arrivals(200, 40))
def test_the_same_requests_give_the_same_result(rows):
    assert simulate(rows, Fleet(2, replica), 0.0) == simulate(rows, Fleet(2, replica), 0.0)


def test_a_lone_request_takes_its_steps():
    result = simulate([TraceRow(1.0, 100, 3)], Fleet(1, replica), 0.002)
    (request,) = result.requests
    assert request.ttft == pytest.approx(0.002 + 2 * 1e-3 + 100 * 1e-5)  # two chunks of at most 64 tokens
    assert request.tpot == pytest.approx(1e-3 + 1e-5)


def test_requests_with_equal_hash_ids_share_their_prefix():
    settings = replica(num_blocks=512, max_num_batched_tokens=2048).settings
    own = SimulatedReplica(settings, LinearTimes(), StaticPolicy(LONE))
    first, second = TraceRow(0.0, 900, 4, (7, 8)), TraceRow(1.0, 900, 4, (7, 9))
    result = simulate([first, second], Fleet(1, lambda: own), 0.0)
    assert [request.cached_tokens for request in result.requests] == [0, 512]


def test_a_limit_of_concurrency_holds_requests_back():
    held = simulate(burst(8, 60, 4), Fleet(1, replica), 0.0, max_concurrency=1)
    assert held.requests[-1].arrived > held.requests[0].latency
    ends = [request.arrived + request.latency for request in held.requests]
    assert all(request.arrived >= end for request, end in zip(held.requests[1:], ends, strict=False))


def test_a_burst_goes_to_all_replicas():
    fleet = Fleet(3, replica)
    simulate(burst(9, 60, 4), fleet, 0.0)
    assert len(fleet.replicas) == 3
    assert all(each.timeline for each in fleet.replicas)


@settings(max_examples=25, deadline=None)
@given(arrivals(200, 40), st.integers(2, 5))
def test_requests_go_to_the_replica_with_the_least_load_of_equals_the_first(rows, count):
    class Watched(Fleet):
        def least_loaded(self) -> int:
            loads = [each.load for each in self.replicas] + [(0, 0.0)] * (count - len(self.replicas))
            found = super().least_loaded()
            assert found == loads.index(min(loads))
            return found

    simulate(rows, Watched(count, replica), 0.002)


def test_replicas_without_requests_are_not_made():
    fleet = Fleet(10**12, replica)
    simulate([*burst(3, 60, 4), *(replace(row, at=row.at + 9.0) for row in burst(2, 60, 4))], fleet)
    assert len(fleet.replicas) == 3


def test_progress_is_the_share_of_requests_that_have_ended():
    shares: list[float] = []
    simulate(burst(9, 60, 4), Fleet(2, replica), report=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_threshold_policy_uses_both_modes():
    own = planner()
    layout = next(layout for layout in own.usable if layout.base == Mode(8, 1))
    found = own.evaluate(Candidate(layout, "threshold", threshold=64), burst(), {})
    assert set(found.figures.mode_shares) == {"sp8xtp1", "sp1xtp8"}
    assert sum(found.figures.mode_shares.values()) == pytest.approx(1.0)
