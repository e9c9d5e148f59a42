"""The tier below the cache in virtual time: the engine's own index, with copies that take the time of a link."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3NextConfig

import ulysses_infer
from tests.planning.plans import arrivals, config, llama_config, llama_sizes
from ulysses_infer.bench.serve.traces import TraceRow
from ulysses_infer.cache.offload import LOAD, SPILL, STORE, Move
from ulysses_infer.cache.offload_sizing import OffloadSizes
from ulysses_infer.config import SchedulerConfig
from ulysses_infer.engine.policies import StaticPolicy
from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.layouts import all_layouts
from ulysses_infer.planning.node import HostLink, load_node
from ulysses_infer.planning.planner import Planner
from ulysses_infer.planning.replica import ReplicaSettings, SimulatedReplica
from ulysses_infer.planning.roofline import Link
from ulysses_infer.planning.simulation import Fleet, RequestResult, simulate
from ulysses_infer.planning.sizes import sizes_of
from ulysses_infer.planning.tier import SimulatedTier
from ulysses_infer.step_time.step_shape import StepShape

LONE = Mode(1, 1)
BLOCK_BYTES = 1000
LINK = HostLink(host=Link(0.0, 1e6), disk=Link(0.0, 1e5), staging_bytes=0.0)  # a block: 1 ms, from disk 10 ms more
SHARED = TraceRow(0.0, 513, 2, (1,))
OTHERS = [TraceRow(2.0 + number, 513, 2, (10 + number,)) for number in range(3)]


class LinearTimes:
    """A step takes a millisecond for each of its tokens."""

    modes = (LONE,)
    request_seconds = 0.0

    def seconds(self, mode: Mode, shape: StepShape, is_ahead: bool = True) -> float:
        return 1e-3 * shape.num_tokens


def tier(host: int = 100, disk: int = 0, link: HostLink = LINK) -> SimulatedTier:
    return SimulatedTier(OffloadSizes((host,), (disk,), (BLOCK_BYTES,)), link, 1)


def replica(host: int = 100, disk: int = 0, link: HostLink = LINK, blocks: int = 34) -> SimulatedReplica:
    """Of a cache that holds one of the requests above."""
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=1024)
    make = partial(tier, host, disk, link) if host else None
    own = ReplicaSettings(limits, blocks, 16, 1024, make_tier=make)
    return SimulatedReplica(own, LinearTimes(), StaticPolicy(LONE))


def repeated(own: SimulatedReplica) -> RequestResult:
    """The result of a request that was served before, after others have taken its blocks."""
    rows = [SHARED, *OTHERS, replace(SHARED, at=9.0)]
    return simulate(rows, Fleet(1, lambda: own)).requests[-1]


def test_an_evicted_prefix_is_loaded_instead_of_computed_again():
    lost, kept = repeated(replica(host=0)), repeated(replica())
    assert (lost.cached_tokens, kept.cached_tokens) == (0, 512)
    assert lost.ttft == pytest.approx(0.513)
    assert kept.ttft == pytest.approx(0.001 + 2 * 32 * 0.001)  # one token; 32 blocks leave, and 32 come back


def test_a_prefix_on_disk_takes_longer_to_load():
    own = replica(host=33, disk=200)
    found = repeated(own)
    assert found.cached_tokens == 512
    assert found.ttft > 0.001 + 32 * 0.011
    assert own.tier is not None
    assert own.tier.index.pools[0].num_spilled > 0


@pytest.mark.parametrize("factor", [0.5, 0.1])
def test_a_slower_link_never_makes_a_request_earlier(factor):
    slower = replace(LINK, host=Link(0.0, LINK.host.bytes_per_second * factor))
    assert repeated(replica(link=slower)).ttft > repeated(replica()).ttft


def test_stores_that_fit_in_the_buffer_delay_no_step_but_later_loads():
    own = tier(link=replace(LINK, staging_bytes=8 * BLOCK_BYTES))
    assert own.wait([Move(STORE, 0, block, block) for block in range(8)], now=5.0) == 0.0
    assert own.wait([Move(LOAD, 0, 3, 9)], now=5.0) == pytest.approx(0.009)
    assert own.wait([], now=5.0) == 0.0
    assert own.wait([Move(STORE, 0, block, block) for block in range(10)], now=6.0) == pytest.approx(0.002)


def test_spilled_blocks_do_not_use_the_link_of_the_device():
    assert tier(disk=4).wait([Move(SPILL, 0, 0, 0)], now=0.0) == pytest.approx(0.010)


@settings(max_examples=25, deadline=None)
@given(arrivals(500, 20, 20, st.sampled_from([(1,), (2,), (3,)])), st.integers(1, 60), st.integers(0, 60))
def test_every_request_ends_and_the_same_way_each_time(found, host, disk):
    result = simulate(found, Fleet(1, lambda: replica(host, disk, blocks=48)))
    assert len(result.requests) + result.num_refused == len(found)
    assert result == simulate(found, Fleet(1, lambda: replica(host, disk, blocks=48)))


def with_tier(num_bytes: int):
    own = config()
    own.cache.offload_host_bytes = num_bytes
    return own


@pytest.mark.parametrize(("name", "taken"), [("8xh200", 1 << 25), ("cpu-2cores", 1 << 28)])
def test_the_tier_takes_memory_of_the_cache_on_a_cpu_and_a_buffer_on_a_gpu(name, taken):
    node = load_node(name)
    without, with_it = (all_layouts(llama_sizes(), node, with_tier(size))[0] for size in (0, 1 << 28))
    assert without.cache_bytes - with_it.cache_bytes == taken
    assert with_it.tier_tokens == pytest.approx((1 << 28) / with_it.token_bytes, abs=1)


def test_the_link_of_every_known_node_is_known():
    for name in ("8xh200", "8xh100", "8xb200", "8xa100-80g", "4xl40s", "2x24gb", "cpu-2cores"):
        link = load_node(name).host_link
        assert link is not None
        assert link.disk.bytes_per_second < link.host.bytes_per_second


def test_python_plans_with_a_tier():
    found = [TraceRow(0.01 * n, 600, 3, (n % 3,)) for n in range(9)]
    plan = ulysses_infer.plan(llama_config(), "8xh200", found, offload_host_bytes=1 << 30, max_num_seqs=8)
    assert plan.has_tier
    assert plan.best.figures.cached_share >= plan.best.figures.loaded_share >= 0


@pytest.mark.parametrize(
    ("num_bytes", "node", "message"),
    [
        (1, load_node("8xh200"), "cache.offload_host_bytes = 1 is less than one block"),
        (1 << 30, replace(load_node("8xh200"), host_link=None), "hardware 8xh200 has no host_link"),
    ],
)
def test_a_tier_that_cannot_be_is_one_line(num_bytes, node, message):
    with pytest.raises(ConfigError) as error:
        Planner(llama_sizes(), node, with_tier(num_bytes)).plan([SHARED], {})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tier_for_recurrent_states_is_refused():
    hybrid = sizes_of(Qwen3NextConfig(num_hidden_layers=4))
    with pytest.raises(ConfigError, match="'qwen3_next' has recurrent layers, and snapshots of their states are not"):
        Planner(hybrid, load_node("8xh200"), with_tier(1 << 30))
