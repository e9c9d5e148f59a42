"""The cores that each rank is pinned to."""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.worker import cores
from ulysses_infer.worker.cores import PinnedCores, pin, share_of


def two_nodes(core):
    """8 cores on 2 NUMA nodes, of which 4 to 7 are the second threads of 0 to 3."""
    return (core % 4 // 2, core % 4, core)


def test_a_rank_gets_whole_physical_cores_of_one_node():
    assert [share_of(range(8), index, 2, two_nodes) for index in range(2)] == [[0, 4, 1, 5], [2, 6, 3, 7]]
    assert [share_of(range(8), index, 4, two_nodes) for index in range(4)] == [[0, 4], [1, 5], [2, 6], [3, 7]]


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(1, 16))
def test_shares_are_disjoint_equal_and_allowed(allowed, count):
    shares = [share_of(sorted(allowed), index, count, two_nodes) for index in range(count)]
    assert all(len(share) == len(allowed) // count for share in shares)
    taken = [core for share in shares for core in share]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= allowed


def in_a_thread(function):
    """Affinity is the calling thread's: what is tried here must not outlive the test."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_pinned_threads_start_threads_beside_them_and_are_released():
    def body():
        before = os.sched_getaffinity(0)
        one = min(before)
        pinned = PinnedCores({one})
        inside = os.sched_getaffinity(0), in_a_thread(lambda: os.sched_getaffinity(0))
        pinned.release()
        pinned.release()
        return inside == ({one}, {one}) and os.sched_getaffinity(0) == before

    assert in_a_thread(body)


def test_ranks_without_enough_cores_run_anywhere():
    allowed = frozenset(os.sched_getaffinity(0))
    assert pin(0, len(allowed) + 1, 1, [allowed]) is None
    assert pin(0, 1, len(allowed) + 1, [allowed]) is None


def test_cores_that_a_launcher_distributed_are_left_alone(monkeypatch):
    allowed = frozenset(os.sched_getaffinity(0))
    assert pin(0, 1, 1, [allowed, allowed | {4096}]) is None
    monkeypatch.setattr(os, "cpu_count", lambda: len(allowed) + 1)
    assert pin(0, 1, 1, [allowed]) is None


@pytest.mark.skipif(len(os.sched_getaffinity(0)) != os.cpu_count(), reason="this process may not use every core")
@pytest.mark.parametrize("pins", [True, False])
def test_an_engine_is_pinned_to_its_cores_while_it_lives(folder, monkeypatch, pins):
    before = os.sched_getaffinity(0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(before)))  # as if there were a rank for each core
    with init_inference(folder, **settings(**{"runtime.pin_cores": pins})) as engine:
        inside = os.sched_getaffinity(0)
        engine.generate([[5, 6]], SamplingParams(max_tokens=1))
    assert inside == ({min(before, key=cores.core_location)} if pins else before)
    assert os.sched_getaffinity(0) == before
