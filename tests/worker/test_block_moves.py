"""Moves between the cache and the tier below it: in batches as one after another, on a GPU's way as on a CPU's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.cache.entries import EntryShape
from ulysses_infer.cache.groups import CacheGroups
from ulysses_infer.cache.offload import LOAD, SPILL, STORE, Move
from ulysses_infer.cache.offload_memory import OffloadMemory
from ulysses_infer.cache.offload_sizing import OffloadSizes
from ulysses_infer.cache.paged import FP8, CacheShape, IndexShape, LayerShape, PagedCache
from ulysses_infer.worker.offload.batches import batches
from ulysses_infer.worker.offload.block_rows import BlockRows
from ulysses_infer.worker.offload.copies import DirectCopies, StagedCopies, runs
from ulysses_infer.worker.offload.mover import BlockMover

CPU = torch.device("cpu")
BLOCKS, HOST, DISK = 6, 3, 2
stores = st.builds(Move, st.just(STORE), st.integers(0, 1), st.integers(0, BLOCKS - 1), st.integers(0, HOST - 1))
spills = st.builds(Move, st.just(SPILL), st.integers(0, 1), st.integers(0, HOST - 1), st.integers(0, DISK - 1))
loads = st.builds(Move, st.just(LOAD), st.integers(0, 1), st.integers(0, HOST + DISK - 1), st.integers(0, BLOCKS - 1))


class NumberedPool:
    """Contents of blocks and slots, all different at first."""

    def __init__(self):
        self.blocks = [f"block {number}" for number in range(BLOCKS)]
        self.host = [f"host {number}" for number in range(HOST)]
        self.disk = [f"disk {number}" for number in range(DISK)]

    def apply(self, kind, source, target):
        if kind == STORE:
            self.host[target] = self.blocks[source]
        elif kind == SPILL:
            self.disk[target] = self.host[source]
        else:
            self.blocks[target] = (self.host + self.disk)[source]


@given(st.lists(st.one_of(stores, spills, loads), max_size=25))
def test_batches_do_what_the_moves_do_one_after_another(moves):
    alone, together = [NumberedPool(), NumberedPool()], [NumberedPool(), NumberedPool()]
    for kind, pool, source, target in moves:
        alone[pool].apply(kind, source, target)
    for batch in batches(moves, [HOST, HOST]):
        pool = together[batch.pool]
        for kind, copies in ((SPILL, batch.spills), (STORE, batch.stores), (LOAD, batch.loads)):
            for target, source in reversed(copies.items()):  # in any order
                pool.apply(kind, source, target)
    assert [vars(pool) for pool in together] == [vars(pool) for pool in alone]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_runs_cover_every_pair_once(pairs):
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = list(runs(first, second))
    assert [(a + step, b + step) for a, b, count in found for step in range(count)] == pairs
    assert len(list(runs(range(5), range(2, 7)))) == 1


def make_cache(dtype):
    """Layers of two cache groups: latents with entries joined to them, an index, unequal heads, and one that reads."""
    layers = (LayerShape(1, 6, 4, True), LayerShape(2, 3, 5), None, LayerShape(1, 8, 8), None)
    entries = (EntryShape(0, "joined", 6, 2, is_joined=True), EntryShape(3, "own", 4, 8, AttentionSpan(9)))
    index = IndexShape(frozenset({1}), 3, torch.bfloat16)
    shape = CacheShape(layers, 4, dtype, ((2, 1),), index, entries, torch.float32)
    groups = CacheGroups((AttentionSpan(), AttentionSpan(9)), (0, 0, 0, 1, None), (0, 1))
    return PagedCache(shape, [BLOCKS, 4], CPU, 1, groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("staged", [False, True])
def test_a_block_comes_back_bit_for_bit_in_every_layer_and_entry(dtype, staged, tmp_path):
    cache = make_cache(dtype)
    pools = [cache.tensors_of_group(group) for group in (0, 1)]
    tensors = [tensor for pool in pools for tensor in pool]
    assert len(tensors) == 1 + 2 + 2 + 1 + 1 + 1
    assert sum(BlockRows(pool).num_bytes for pool in pools) == cache.shape.bytes_per_block
    states = torch.empty((5, 24), dtype=torch.uint8)
    for tensor in (*tensors, states):
        raw = tensor.view(torch.uint8)
        raw.copy_(torch.randint(256, raw.shape, dtype=torch.uint8))
    before = [tensor.view(torch.uint8).clone() for tensor in (*tensors, states)]
    sizes = OffloadSizes((2, 2, 2), (2, 1, 1), tuple(BlockRows(pool).num_bytes for pool in [*pools, [states]]))
    copies = (lambda rows: StagedCopies(CPU, [each.num_bytes for each in rows])) if staged else lambda _: DirectCopies()
    mover = BlockMover(lambda: [*pools, [states]], OffloadMemory(sizes, str(tmp_path), pins=False), copies)
    mover.take()
    moves = [Move(STORE, 0, 4, 0), Move(STORE, 0, 1, 1), Move(STORE, 1, 2, 1), Move(STORE, 2, 3, 0)]
    mover.apply([*moves, Move(SPILL, 0, 0, 1), Move(SPILL, 2, 0, 0)])
    for tensor in (*tensors, states):
        tensor.view(torch.uint8).zero_()
    mover.apply([Move(LOAD, 0, 3, 0), Move(LOAD, 0, 1, 5), Move(LOAD, 1, 1, 3), Move(LOAD, 2, 2, 4)])
    for number, (tensor, old) in enumerate(zip((*tensors, states), before, strict=True)):
        returned = ((0, 4), (5, 1)) if number < len(pools[0]) else ((4, 3),) if tensor is states else ((3, 2),)
        for new_block, old_block in returned:
            assert torch.equal(tensor.view(torch.uint8)[new_block], old[old_block])
        others = [block for block in range(len(old)) if block not in dict(returned)]
        assert not tensor.view(torch.uint8)[others].any(), "other blocks are left alone"
    mover.release()
