"""Process groups of every mode, on real ranks: their ranks, the order of these, and errors when ranks differ."""

import os
import time
from datetime import timedelta

import pytest
import torch

from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.groups import build_groups
from ulysses_infer.parallel.layout import Layout, Mode

CPU = torch.device("cpu")
LAYOUTS = [
    (world_size, tp, order)
    for world_size in (2, 4, 8)
    for tp in (1, 2, 4, 8)
    if tp <= world_size
    for order in ("sp_inner", "tp_inner")
]


BACKENDS = ("torch", "shared_memory")


def members(group):
    """Global ranks of a group in the order of its own ranks; None stays None."""
    return None if group is None else group.ranks


def membership(backend, world_size, tp, order):
    """On a rank: (shard, {mode: (SP ranks, TP ranks)}) of all modes, and that the groups work."""
    layout = Layout(Mode(world_size // tp, tp), order)
    groups = build_groups(layout, layout.modes, CPU, collectives=backend)
    found = {}
    for mode, collectives in groups.by_mode.items():
        total = torch.tensor([float(groups.shard)])
        for group in (collectives.sp_group, collectives.tp_group):
            if group is not None:
                group.sum(total)
        assert collectives.place.mode == mode
        found[mode] = members(collectives.sp_group), members(collectives.tp_group), int(total)
    shard, order_of_shards, world = groups.shard, groups.shard_order, members(groups.world)
    groups.close()
    return shard, order_of_shards, world, found


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "tp", "order"), LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_are_those_of_the_layout(rank_pool, backend, world_size, tp, order):
    layout = Layout(Mode(world_size // tp, tp), order)
    for rank, (shard, shard_order, world, found) in enumerate(
        rank_pool(world_size).run(membership, backend, world_size, tp, order)
    ):
        assert shard == layout.shard_of(rank)
        assert world == list(range(world_size))
        assert [layout.shard_of(r) for r in shard_order] == list(range(world_size))
        for mode in layout.modes:
            sp_ranks, tp_ranks, total = found[mode]
            # The ranks of the SP group are in the order of their shards: the all-to-all relies on it.
            assert sp_ranks == (layout.sp_group(mode, shard) if mode.sp > 1 else None)
            assert tp_ranks == (sorted(layout.tp_group(mode, shard)) if mode.tp > 1 else None)
            # Summed over both groups, every shard is counted once.
            assert total == sum(range(world_size))


def refused(sp, tp):
    with pytest.raises(ConfigError) as caught:
        build_groups(Layout(Mode(sp, tp)), [Mode(sp, tp)], CPU)
    return str(caught.value)


@pytest.mark.distributed
@pytest.mark.parametrize(("sp", "tp"), [(1, 1), (4, 1), (2, 2), (3, 1)])
def test_another_number_of_ranks_than_the_layout_is_refused(rank_pool, sp, tp):
    for message in rank_pool(2).run(refused, sp, tp):
        assert f"{sp} * {tp} = {sp * tp}, but the job has 2 ranks" in message
        assert "\n" not in message


def test_a_single_rank_needs_no_groups(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    groups = build_groups(Layout(Mode(1, 1)), [Mode(1, 1)], CPU)
    assert (groups.world, groups.control, groups.is_first) == (None, None, True)
    groups.close()


def wait_for_a_silent_rank(backend, seconds):
    """Rank 0 waits for rank 1, which is late. Returns how long, and whether rank 1 may wait longer than that."""
    layout = Layout(Mode(2, 1))
    groups = build_groups(layout, layout.modes, CPU, collectives=backend)
    groups.limit_waits(seconds)
    started = time.monotonic()
    message = torch.zeros(1)
    if os.environ["RANK"] == "1":
        time.sleep(3 * seconds)
        torch.distributed.all_reduce(torch.ones(1))  # rank 0 is past its time-out
        groups.close()
        return None
    with pytest.raises(RuntimeError, match="Timed out"):
        groups.world.sum(message)
    waited = time.monotonic() - started
    torch.distributed.all_reduce(torch.ones(1))
    groups.close()
    return waited


@pytest.mark.distributed
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wait_for_a_silent_rank_ends(rank_pool, backend):
    waited, _ = rank_pool(2).run(wait_for_a_silent_rank, backend, 0.5)
    assert 0.4 < waited < 1.4


def idle(backend, seconds):
    """Rank 0 sends nothing for longer than the limit, then sends."""
    layout = Layout(Mode(2, 1))
    groups = build_groups(layout, layout.modes, CPU, collectives=backend)
    groups.limit_waits(seconds)
    if groups.is_first:
        time.sleep(4 * seconds)
        groups.mailbox.send(b"seven")
        message = b"seven"
    else:
        message = groups.mailbox.receive()
    groups.close()
    return message


@pytest.mark.distributed
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_idle_engine_does_not_time_out(rank_pool, backend):
    assert rank_pool(2).run(idle, backend, 0.2) == [b"seven", b"seven"]


def leave_early(backend):
    """Rank 1 closes its groups while rank 0 waits in them; the job's own group still works."""
    layout = Layout(Mode(2, 1))
    groups = build_groups(layout, layout.modes, CPU, collectives=backend)
    if groups.is_first:
        with pytest.raises(RuntimeError, match=r"closed by peer|reset"):
            groups.world.gather_to_first(torch.zeros(1))
    else:
        time.sleep(0.3)
    groups.close()
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    return float(total)


@pytest.mark.distributed
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_leaves_ends_the_waits_of_others_and_spares_the_job(rank_pool, backend):
    assert rank_pool(2).run(leave_early, backend) == [2.0, 2.0]


def test_waits_for_the_next_command_are_not_limited():
    class Recorder:
        def set_timeout(self, timeout):
            self.timeout = timeout

    from ulysses_infer.parallel.groups import IDLE_TIMEOUT, ProcessGroups

    for rank, control_timeout in ((0, timedelta(seconds=5)), (1, IDLE_TIMEOUT)):
        world, control = Recorder(), Recorder()
        ProcessGroups(Layout(Mode(2, 1)), rank, control=control, owned=[world, control]).limit_waits(5)
        assert (world.timeout, control.timeout) == (timedelta(seconds=5), control_timeout)
