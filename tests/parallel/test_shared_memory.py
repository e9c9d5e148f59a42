"""Collectives in shared memory on real ranks: correct in any order and size, and an error when a rank is lost."""

import gc
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import RankPool
from ulysses_infer.errors import ConfigError
from ulysses_infer.native.library import NativeUnavailableError, is_available
from ulysses_infer.parallel import shared_memory
from ulysses_infer.parallel.groups import build_groups
from ulysses_infer.parallel.layout import Layout, Mode, token_spans
from ulysses_infer.parallel.shared_group import SharedMemoryGroup
from ulysses_infer.parallel.torch_group import TorchProcessGroup

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not is_available("collectives"), reason="no C compiler"),
]
CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LAYOUTS = [(2, 1, "sp_inner"), (3, 1, "sp_inner"), (2, 2, "sp_inner"), (2, 2, "tp_inner")]
COUNTS = (0, 1, 7, 512, 513, 5000, 16_384, 16_385, 300_001)  # of one phase, of two, of several chunks


def shared(layout):
    return build_groups(layout, layout.modes, CPU, collectives="shared_memory")


def wild(count, dtype, seed):
    """Numbers of all sizes, with infinities and NaN here and there."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(count, generator=generator) * 10 ** torch.randint(-6, 4, (count,), generator=generator)
    odd = torch.rand(count, generator=generator)
    numbers[odd < 0.01] = float("inf")
    numbers[odd > 0.995] = float("nan")
    return numbers.to(dtype)


def total(parts):
    """The sum in the order of the parts, rounded once."""
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    summed = parts[0].to(wide)
    for part in parts[1:]:
        summed = summed + part.to(wide)
    return summed.to(parts[0].dtype)


def same(found, expected):
    return torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)) and torch.equal(found.isnan(), expected.isnan())


# -- results -------------------------------------------------------------------------------------------------------


def sum_everything(sp, tp, order):
    layout = Layout(Mode(sp, tp), order)
    groups = shared(layout)
    for mode, collectives in groups.by_mode.items():
        group = collectives.tp_group
        for dtype in DTYPES if group is not None else ():
            for count in COUNTS:
                seeds = [100 * rank + count for rank in group.ranks]
                mine = wild(count, dtype, 100 * groups.rank + count)
                assert group.sum(mine) is mine
                assert same(mine, total([wild(count, dtype, seed) for seed in seeds])), (mode, dtype, count)
    groups.close()


@pytest.mark.parametrize(("sp", "tp", "order"), LAYOUTS)
def test_sums_are_in_group_order_on_every_rank(rank_pool, sp, tp, order):
    rank_pool(sp * tp).run(sum_everything, sp, tp, order)


def run_at_random(sp, tp, order, seed):
    """The same exchanges in shared memory and by gloo, drawn alike on all ranks, with pauses that differ."""
    layout = Layout(Mode(sp, tp), order)
    both = shared(layout), build_groups(layout, layout.modes, CPU, collectives="torch")
    draw, pauses = random.Random(seed), random.Random(os.environ["RANK"])
    for _ in range(150):
        mode, kind, dtype = draw.choice(layout.modes), draw.randrange(4), draw.choice(DTYPES)
        num_tokens, heads = draw.choice((1, 2, 5, 64, 700)), draw.choice((1, 3))
        inputs = torch.Generator().manual_seed(draw.randrange(1000) * 10 + both[0].rank)
        found = []
        for groups in both:
            if pauses.random() < 0.05:
                time.sleep(pauses.random() / 100)
            found.append(exchange(groups, mode, kind, dtype, num_tokens, heads, inputs.clone_state()))
        for mine, theirs in zip(*found, strict=True):
            assert torch.equal(mine, theirs), (mode, kind, dtype, num_tokens, heads)
    for groups in both:
        groups.close()


def exchange(groups, mode, kind, dtype, num_tokens, heads, inputs):
    collectives = groups.by_mode[mode]
    spans = token_spans(num_tokens, mode.sp)
    local = spans[collectives.place.token_index].size
    if kind == 0 and mode.sp > 1:
        # As projections give them: heads before tokens in memory, or packed side by side.
        query = torch.randn(heads * mode.sp, local, 8, generator=inputs).to(dtype).transpose(0, 1)
        packed = torch.randn(local, 2 * mode.sp, 6, generator=inputs).to(dtype)
        sources = (query, packed[:, : mode.sp], packed[:, mode.sp :])
        return collectives.tokens_to_heads(sources, spans)
    if kind == 1 and mode.sp > 1:
        output = torch.randn(num_tokens, heads * 50, generator=inputs).to(dtype)
        return [collectives.heads_to_tokens(output, spans)]
    if kind == 2:
        rows = torch.randn(local, 33 * heads, generator=inputs).to(dtype)
        return [collectives.gather_rows(rows, [span.size for span in spans])]
    gathered = groups.gather_to_first(torch.randn(num_tokens, 40 * heads, generator=inputs).to(dtype))
    return [] if gathered is None else [gathered]


@pytest.mark.parametrize(("sp", "tp", "order"), LAYOUTS)
@pytest.mark.parametrize("seed", range(2))
def test_collectives_in_any_order_match_gloo(rank_pool, sp, tp, order, seed):
    rank_pool(sp * tp).run(run_at_random, sp, tp, order, seed)


def sum_again_and_again(world_size, rounds):
    """A rank that reads a slot late, or writes one early, gets another sum."""
    groups = shared(Layout(Mode(world_size, 1)))
    group, pauses = groups.world, random.Random(groups.rank)
    for turn in range(rounds):
        if pauses.random() < 0.002:
            time.sleep(pauses.random() / 200)
        partial = torch.full((turn % 70,), float(turn + groups.rank))
        expected = world_size * turn + sum(range(world_size))
        assert bool((group.sum(partial) == expected).all()), turn
        if turn % 5 == 0:
            gathered = groups.gather_to_first(torch.tensor([turn * 10 + groups.rank]))
            assert gathered is None or [int(x) for x in gathered] == [turn * 10 + rank for rank in range(world_size)]
    groups.close()
    return rounds


@pytest.mark.parametrize(("world_size", "rounds"), [(2, 5000), (3, 1500), (8, 300)])
def test_thousands_of_collectives_in_a_row_do_not_mix(rank_pool, world_size, rounds):
    """Most test machines have fewer than eight cores."""
    assert rank_pool(world_size).run(sum_again_and_again, world_size, rounds) == [rounds] * world_size


def sum_unusual():
    groups = shared(Layout(Mode(1, 2)))
    strided = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(groups.world.sum(strided), 2 * torch.arange(12.0).view(3, 4).t())
    assert torch.equal(strided, 2 * torch.arange(12.0).view(3, 4).t()), "in place"
    with pytest.raises(TypeError, match="int64 cannot be summed"):
        groups.world.sum(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="a single row of this exchange is larger"):
        groups.world.heads_to_tokens(torch.zeros(2, 1 << 20), token_spans(2, 2))
    group = groups.world
    groups.close()
    with pytest.raises(RuntimeError, match="this rank has left"):
        group.sum(torch.zeros(3))


def test_unsupported_tensors_raise_an_error(rank_pool):
    rank_pool(2).run(sum_unusual)


# -- availability --------------------------------------------------------------------------------------------------


def build_where_one_cannot(collectives):
    def fail(name):
        raise NativeUnavailableError("no C compiler (cc, gcc, clang or $CC) was found")

    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            patch.setattr(shared_memory, "open_library", fail)
        try:
            groups = build_groups(Layout(Mode(2, 1)), [Mode(2, 1)], CPU, collectives=collectives)
        except ConfigError as error:
            return str(error)
    total = groups.world.sum(torch.ones(1))
    kind = type(groups.world)
    groups.close()
    return kind, float(total)


def test_one_rank_without_shared_memory_disables_it_on_all(rank_pool):
    assert rank_pool(2).run(build_where_one_cannot, "auto") == [(TorchProcessGroup, 2.0)] * 2
    message = (
        "runtime.collectives = shared_memory, but rank 1: no C compiler (cc, gcc, clang or $CC) was found; "
        "use auto or torch"
    )
    assert rank_pool(2).run(build_where_one_cannot, "shared_memory") == [message] * 2


def build_on_two_hosts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "host_identity", lambda: f"host of {os.environ['RANK']}")
        with pytest.raises(ConfigError, match="the ranks are not on one host"):
            shared(Layout(Mode(2, 1)))


def build_with_another_auth_token():
    """The same pid and file descriptor may name another file, e.g. in another PID namespace."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "0":
            patch.setattr(shared_memory.os, "pwrite", lambda file, word, place: None)
        with pytest.raises(ConfigError, match="cannot open the memory of rank 0: another process holds that file"):
            shared(Layout(Mode(2, 1)))


def test_ranks_of_different_hosts_do_not_share_memory(rank_pool):
    rank_pool(2).run(build_on_two_hosts)
    rank_pool(2).run(build_with_another_auth_token)


def choose(collectives):
    groups = build_groups(Layout(Mode(2, 1)), [Mode(2, 1)], CPU, collectives=collectives)
    kind = type(groups.world)
    groups.close()
    return kind


def test_ranks_of_one_host_share_memory_by_default(rank_pool):
    assert rank_pool(2).run(choose, "auto") == [SharedMemoryGroup] * 2
    assert rank_pool(2).run(choose, "torch") == [TorchProcessGroup] * 2


# -- leftovers and waits -------------------------------------------------------------------------------------------


def maps():
    """Shared memory of an engine in this process."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:ulysses_infer" in line]


def build_and_look():
    gc.collect()  # an engine of an earlier test may not be gone yet
    before, earlier = len(os.listdir("/proc/self/fd")), set(maps())
    for _ in range(3):
        groups = shared(Layout(Mode(2, 1)))
        groups.world.sum(torch.ones(100_000))
        assert set(maps()) - earlier
        torch.distributed.barrier(groups.control)
        groups.close()
    assert set(maps()) <= earlier
    assert not [name for name in os.listdir("/dev/shm") if "ulysses" in name]
    return len(os.listdir("/proc/self/fd")) - before


def test_closing_leaves_no_memory_no_file_and_no_name(rank_pool):
    rank_pool(2).run(build_and_look)  # the first time, libraries open files of their own
    left = rank_pool(2).run(build_and_look)
    assert max(left) < 3, left


def wait_idly(seconds):
    groups = shared(Layout(Mode(2, 1)))
    if groups.is_first:
        time.sleep(seconds)
        groups.mailbox.send(b"at last")
        groups.world.sum(torch.ones(1))
        groups.close()
        return 0.0
    started = time.thread_time()
    assert groups.mailbox.receive() == b"at last"
    took = time.thread_time() - started
    groups.world.sum(torch.ones(1))
    groups.close()
    return took


def test_a_rank_that_waits_long_sleeps(rank_pool):
    seconds = 2.0
    assert max(rank_pool(2).run(wait_idly, seconds)) < seconds / 50


# -- lost ranks ----------------------------------------------------------------------------------------------------


def lose_a_rank(folder, number):
    """The last rank gets a signal in the middle of a sum; the others write the error that they get."""
    groups = shared(Layout(Mode(3, 1)))
    groups.limit_waits(60.0 if number == signal.SIGKILL else 1.0)
    groups.world.sum(torch.ones(10))
    gathered = groups.gather_to_first(torch.tensor([os.getpid()]))
    pids = [] if gathered is None else gathered.flatten().tolist()
    if groups.rank == 2:
        os.kill(os.getpid(), number)
    started = time.monotonic()
    try:
        groups.world.sum(torch.ones(10))
    except RuntimeError as error:
        report = {"error": str(error), "seconds": time.monotonic() - started}
        Path(folder, f"{groups.rank}.json").write_text(json.dumps(report))
    groups.close()
    if number == signal.SIGSTOP and pids:
        deadline = time.monotonic() + 20
        while not Path(folder, "1.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(pids[2], signal.SIGCONT)


@pytest.fixture
def own_pool():
    """Ranks that a test may kill."""
    pool = RankPool(3)
    yield pool
    pool.close()


def reported_errors(folder):
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, 1)]


def test_a_killed_rank_ends_the_wait_of_the_others(own_pool, tmp_path):
    with pytest.raises(RuntimeError, match="the rank's process ended"):
        own_pool.run(lose_a_rank, str(tmp_path), signal.SIGKILL)
    for each in reported_errors(tmp_path):
        assert "Connection closed by peer" in each["error"]
        assert each["seconds"] < 10
    assert not [name for name in os.listdir("/dev/shm") if "ulysses" in name]


def test_a_stopped_rank_ends_the_wait_of_the_others_when_time_is_up(own_pool, tmp_path):
    own_pool.run(lose_a_rank, str(tmp_path), signal.SIGSTOP)
    for each in reported_errors(tmp_path):
        assert each["error"].startswith(("Timed out waiting for rank 2", "Connection closed by peer: rank"))
        assert each["seconds"] > 0.5
