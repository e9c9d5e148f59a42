"""Whole simulations follow the hardware: requests that arrive together never end later on faster parts.

Together, because then steps hold the same tokens however long they take. With arrivals over time a shorter step may
start just before a request arrives that the longer one would have included.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planning.plans import burst, config, faster, free_links, llama_sizes, planner
from ulysses_infer.bench.serve.traces import TraceRow
from ulysses_infer.engine.policies import StaticPolicy
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.node import Node, load_node
from ulysses_infer.planning.planner import Candidate, Planner
from ulysses_infer.planning.replica import SimulatedReplica
from ulysses_infer.planning.simulation import Fleet, SimulationResult, simulate
from ulysses_infer.planning.workload import Traffic

SP, TP = Mode(8, 1), Mode(1, 8)
together = st.lists(
    st.builds(TraceRow, st.just(0.0), st.integers(1, 1500), st.integers(1, 12), st.just(())), min_size=1, max_size=8
)


def run(node: Node, rows: list[TraceRow], mode: Mode) -> tuple[SimulationResult, SimulatedReplica]:
    own = Planner(llama_sizes(), node, config())
    layout = next(layout for layout in own.usable if layout.base == SP)
    replica = SimulatedReplica(own.settings(layout), own.times(layout), StaticPolicy(mode))
    return simulate(rows, Fleet(1, lambda: replica), 0.0), replica


@settings(max_examples=12, deadline=None)
@given(
    together,
    st.sampled_from([SP, TP]),
    st.sampled_from(["products", "prefill_attention", "decode_attention", "all_reduce", "all_to_all", "all_gather"]),
    st.floats(1, 10),
)
def test_no_request_ends_later_with_more_bandwidth(rows, mode, part, factor):
    node = load_node("8xh200")
    slow, fast = run(node, rows, mode)[0], run(faster(node, part, factor), rows, mode)[0]
    assert len(slow.requests) == len(rows)
    for before, after in zip(slow.requests, fast.requests, strict=True):  # in the same order, that of their ends
        assert after.latency <= before.latency * (1 + 1e-9)
        assert after.ttft <= before.ttft * (1 + 1e-9)


@settings(max_examples=10, deadline=None)
@given(together)
def test_with_free_links_sequence_parallelism_loses_at_most_the_reading_of_its_weights(rows):
    node, sizes = load_node("8xh200"), llama_sizes()
    (sequence, replica), (tensor, _) = (run(free_links(node), rows, mode) for mode in (SP, TP))
    reading = 2 * sizes.layer_weights / node.products["bf16"].bytes_per_second
    norms = sizes.num_layers * node.elementwise.floor_seconds  # which the sum over the ranks includes
    assert sequence.seconds <= tensor.seconds + len(replica.timeline) * (reading + norms)


@pytest.mark.parametrize("policy", ["static", "threshold", "adaptive"])
def test_every_layout_serves_every_request_and_repeats_itself(policy):
    own, rows = planner(), burst(12, 700, 6)
    for layout in own.usable:
        if policy == "static" or len(layout.modes) > 1:
            candidate = Candidate(layout, policy, layout.base, 64)
            found, again = own.evaluate(candidate, rows, {}), own.evaluate(candidate, rows, {})
            assert found.figures == again.figures
            assert (found.figures.num_requests, found.figures.num_refused) == (12, 0)
            assert found.replica.scheduler.allocator.num_used == 0


def test_a_seed_determines_the_traffic():
    traffic = Traffic(400, 10, 20.0, 30)
    assert traffic.rows() == traffic.rows()
    assert traffic.rows() != replace(traffic, seed=1).rows()
