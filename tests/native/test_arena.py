"""Memory of recorded steps: no two live tensors share any of it, and all of it comes back."""

from __future__ import annotations

import gc

import torch
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.native.arena import ALIGNMENT, CHUNK_BYTES, Arena

SHAPES = st.lists(st.integers(0, 300), min_size=1, max_size=2).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64])


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() < other.data_ptr() + other.nbytes and other.data_ptr() < one.data_ptr() + one.nbytes


@given(st.lists(st.tuples(SHAPES, DTYPES, st.booleans()), max_size=30), st.randoms(use_true_random=False))
def test_live_tensors_never_overlap_and_are_aligned(wanted, random):
    arena, alive = Arena(), []
    arena.restart()
    for shape, dtype, drops in wanted:
        made = arena.empty(shape, dtype)
        assert (made.shape, made.dtype, made.is_contiguous()) == (shape, dtype, True)
        if made.numel():
            assert made.data_ptr() % ALIGNMENT == 0
            assert not any(overlap(made, other) for other in alive)
            alive.append(made)
        del made
        if drops and alive:
            alive.pop(random.randrange(len(alive)))


def test_memory_is_used_again_when_the_last_view_is_gone():
    arena = Arena()
    arena.restart()
    first = arena.empty((1000,), torch.float32)
    place, view = first.data_ptr(), first.view(10, 100)[3]
    del first
    gc.collect()
    assert arena.empty((1000,), torch.float32).data_ptr() != place
    del view
    gc.collect()
    assert arena.empty((1000,), torch.float32).data_ptr() == place


def test_a_long_chain_of_results_takes_the_memory_of_few():
    arena = Arena()
    arena.restart()
    tensor = arena.empty((CHUNK_BYTES // 16,), torch.float32)
    for _ in range(100):
        following = arena.empty(tensor.shape, torch.float32)
        tensor = following
    assert arena.num_bytes <= 3 * CHUNK_BYTES


def test_each_recording_begins_with_all_of_the_memory():
    arena = Arena()
    arena.restart()
    kept = arena.empty((64,), torch.float32)
    arena.restart()
    again = arena.empty((64,), torch.float32)
    assert again.data_ptr() == kept.data_ptr()
    place = again.data_ptr()
    del kept  # of the previous recording: freeing it gives no memory to this one
    gc.collect()
    assert arena.empty((64,), torch.float32).data_ptr() != place


def test_what_is_larger_than_a_chunk_gets_one_of_its_own():
    arena = Arena()
    arena.restart()
    assert arena.empty((CHUNK_BYTES,), torch.float32).numel() == CHUNK_BYTES
    assert arena.num_bytes == 4 * CHUNK_BYTES
