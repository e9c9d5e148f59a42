"""Our collectives between real rank processes, in Triton's interpreter, over memory that all of them map."""

from __future__ import annotations

import random
import time

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tests.kernels.interpreter import use_exact_rounding
from tests.parallel.symmetric_files import FileAllocator
from ulysses_infer.kernels import collectives
from ulysses_infer.kernels.launch import assume
from ulysses_infer.kernels.norm import rms_norm
from ulysses_infer.kernels.peers import PeerBuffers
from ulysses_infer.kernels.scaled_rows import GROUPED, NONE, ROW
from ulysses_infer.parallel.layout import token_spans

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALF = 16 << 10


def open_buffers(folder: str, programs: int) -> tuple[PeerBuffers, object]:
    """The buffers of this rank in a group of all ranks, and what keeps them."""
    group = torch.distributed.group.WORLD
    ranks = torch.distributed.get_world_size()
    allocator = FileAllocator(folder)
    memory = allocator.meet(allocator.reserve(2 * HALF + 8 * programs * ranks, torch.device("cpu")), group)
    halves = torch.tensor(memory.addresses)
    epochs = torch.zeros(programs, dtype=torch.int64)
    torch.distributed.barrier()  # no rank may signal before all have cleared their flags
    return PeerBuffers(halves, halves + 2 * HALF, epochs, memory.rank, HALF), memory


def inputs(seed: int, rank: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """What `rank` has; every rank can compute it."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * seed + rank)).to(dtype)


def total(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum in the order of the parts, rounded once."""
    summed = parts[0].float()
    for part in parts[1:]:
        summed = summed + part.float()
    return summed.to(parts[0].dtype)


def check_sum(draw: random.Random, seed: int, ranks: int, peers: PeerBuffers) -> None:
    dtype, size = draw.choice(DTYPES), draw.choice((1, 7, 1000, 1024, 1025, 3000))
    parts = [inputs(seed, rank, size, dtype=dtype) for rank in range(ranks)]
    mine = parts[peers.rank].clone()
    collectives.sum_in_place(mine, peers)
    assert torch.equal(mine, total(parts)), (seed, dtype, size)


def check_norm(draw: random.Random, seed: int, ranks: int, peers: PeerBuffers) -> None:
    dtype, rows, kind = draw.choice(DTYPES), draw.choice((1, 3, 7)), draw.choice((NONE, ROW, GROUPED))
    width = draw.choice((128, 256)) if kind == GROUPED else draw.choice((40, 128, 300))
    parts = [inputs(seed, rank, rows, width, dtype=dtype) for rank in range(ranks)]
    residual, weight = (inputs(seed, place, rows, width, dtype=dtype) for place in (100, 101))
    weight = weight[0].clone()
    expected_residual = residual.clone()
    expected = rms_norm(total(parts), weight, 1e-5, expected_residual, kind)
    found = collectives.sum_add_norm(parts[peers.rank], residual, weight, 1e-5, kind, peers)
    assert torch.equal(residual, expected_residual), (seed, dtype, rows, width)
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, expected), (seed, dtype, rows, width)
        return
    assert found.kind == expected.kind == kind
    assert torch.equal(found.values[:rows].float(), expected.values[:rows].float())
    assert torch.equal(found.scales[:rows], expected.scales[:rows])


def check_exchange(draw: random.Random, seed: int, ranks: int, peers: PeerBuffers) -> None:
    dtype, tokens, width = draw.choice(DTYPES), draw.choice((1, ranks - 1, ranks, 7)), draw.choice((5, 48, 64))
    spans = token_spans(tokens, ranks)
    whole = inputs(seed, 0, tokens, ranks, width + 3, dtype=dtype)[..., :width]  # rows with a gap
    mine = spans[peers.rank]
    received = collectives.tokens_to_heads(whole[mine.start : mine.stop], tokens, peers)
    assert torch.equal(received, whole[:, peers.rank]), (seed, dtype, tokens, width)
    back = collectives.heads_to_tokens(whole[:, peers.rank], tokens, mine.size, peers)
    assert torch.equal(back, whole[mine.start : mine.stop]), (seed, dtype, tokens, width)


def run_rounds(folder: str, rounds: int, programs: int) -> int:
    """Calls drawn alike on all ranks, with pauses that differ. Raises on the first difference."""
    use_exact_rounding()
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    peers, memory = open_buffers(folder, programs)
    draw, pauses = random.Random(7), random.Random(rank)
    with assume("cpu", (9, 0)):
        for seed in range(rounds):
            if pauses.random() < 0.2:
                time.sleep(pauses.random() / 200)
            draw.choice((check_sum, check_norm, check_exchange))(draw, seed, ranks, peers)
    assert len(set(peers.epochs.tolist())) == 1, "programs that a call does not need count it too"
    assert peers.epochs[0] >= rounds
    torch.distributed.barrier()
    del memory
    return rounds


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "rounds", "programs"), [(2, 40, 2), (3, 10, 4)])
def test_calls_of_changing_kind_and_size_do_not_mix(rank_pool, tmp_path, ranks, rounds, programs) -> None:
    """With few programs, so that each does several tiles and rows."""
    assert rank_pool(ranks).run(run_rounds, str(tmp_path), rounds, programs) == [rounds] * ranks


@pytest.mark.thorough
@pytest.mark.timeout(1200)
@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "rounds", "programs"), [(2, 150, 8), (4, 100, 4), (8, 10, 8)])
def test_many_calls_do_not_mix(rank_pool, tmp_path, ranks, rounds, programs) -> None:
    found = rank_pool(ranks).run(run_rounds, str(tmp_path), rounds, programs, timeout=1200)
    assert found == [rounds] * ranks


def run_without_waiting(folder: str) -> bool:
    """Whether rank 0 gets another sum if kernels do not wait and rank 1 is late."""
    peers, memory = open_buffers(folder, 2)
    parts = [torch.full((10,), 1.0), torch.full((10,), 2.0)]
    if peers.rank == 1:
        time.sleep(1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "meet_all", triton.jit(_meet_nobody))
        collectives.sum_in_place(parts[peers.rank], peers)
    torch.distributed.barrier()
    del memory
    return not torch.equal(parts[peers.rank], torch.full((10,), 3.0))


def _meet_nobody(flags, epoch, rank: tl.constexpr, ranks: tl.constexpr, peers: tl.constexpr) -> None:
    pass


@pytest.mark.distributed
def test_a_kernel_that_does_not_wait_is_noticed(rank_pool, tmp_path) -> None:
    assert rank_pool(2).run(run_without_waiting, str(tmp_path)) == [True, False]
