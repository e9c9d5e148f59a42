"""The adapters to GPU attention libraries, over stand-ins of the libraries, compared with the torch loop."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from tests.attention import cuda_fakes
from tests.attention.reference import unseen_blocks
from ulysses_infer.attention.backend import (
    AttentionMetadata,
    AttentionOptions,
    HostSequences,
    KernelSequences,
    running_sums,
)
from ulysses_infer.attention.flash_attn import FlashAttnAttention
from ulysses_infer.attention.flashinfer import FlashInferAttention, pages_of
from ulysses_infer.attention.flex import FlexAttention, make_mask, make_tiles
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.attention.varlen import VarlenAttention

NUM_BLOCKS, BLOCK_SIZE, WIDTH = 48, 4, 8
HEADS = ((4, 4), (8, 2), (6, 1))
CASES = {
    "decodes": ((1, 1, 1), (1, 9, 17)),
    "a prompt": ((13,), (13,)),
    "chunks and decodes": ((5, 1, 3, 1), (5, 12, 23, 4)),
}
KINDS = {
    "plain": {},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "window, soft cap and sinks": {"sliding_window": 7, "softcap": 2.0, "sinks": True},
    "chunks": {"chunk_size": 6},
}


def triton_attention():
    """Our own kernel, in Triton's interpreter."""
    pytest.importorskip("triton")
    from ulysses_infer.attention.triton import TritonAttention

    return TritonAttention()


BACKENDS = {
    "flash_attn": lambda: FlashAttnAttention(cuda_fakes.flash_attn_varlen_func),
    "flashinfer": lambda: FlashInferAttention(cuda_fakes.FlashInfer(), torch.device("cpu")),
    "varlen": lambda: VarlenAttention(cuda_fakes.varlen_attn),
    "flex": lambda: FlexAttention(flex_attention),
    "triton": triton_attention,
}
CANNOT = {("varlen", "softcap"), *((name, "chunk_size") for name in ("flash_attn", "flashinfer", "varlen"))}


def make_metadata(lengths, contexts, seed=0, shared=False):
    """Sequences over shuffled blocks, their tables padded with a block of another sequence."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    needed = [-(-context // BLOCK_SIZE) for context in contexts]
    tables = np.full((len(contexts), max(needed) + 1), free[-1], dtype=np.int32)
    for row, count in enumerate(needed):
        tables[row, :count] = [free.pop() for _ in range(count)]
    if shared:
        tables[:, 0] = tables[0, 0]  # a common prefix
    host = HostSequences(np.array(lengths, dtype=np.int32), np.array(contexts, dtype=np.int32), tables)
    device = [running_sums(host.query_lens), running_sums(host.context_lens), host.context_lens, tables]
    kernel = KernelSequences(*map(torch.from_numpy, device), max(lengths), max(contexts), host)
    nowhere = torch.zeros(sum(lengths), dtype=torch.int64)
    return AttentionMetadata(nowhere, list(lengths), list(contexts), torch.from_numpy(tables).long(), kernel)


@functools.cache
def make_cache(key_value_heads):
    generator = torch.Generator().manual_seed(1)
    shape = (NUM_BLOCKS, BLOCK_SIZE, key_value_heads, WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def make_options(kind, heads, device="cpu"):
    sinks = torch.linspace(-1, 2, heads, device=device) if kind.get("sinks") else None
    return AttentionOptions(**{"scaling": 0.4, **kind, "sinks": sinks})


def check(backend, lengths, contexts, heads, kind, **how):
    """`backend` and the torch loop give the same."""
    metadata, options = make_metadata(lengths, contexts, **how), make_options(kind, heads[0])
    query = torch.randn(sum(lengths), heads[0], WIDTH, generator=torch.Generator().manual_seed(2))
    inputs = query, *make_cache(heads[1]), metadata, options
    torch.testing.assert_close(backend.attend(*inputs), TorchLoopAttention().attend(*inputs), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in BACKENDS
        for kind, fields in KINDS.items()
        if not any((name, field) in CANNOT for field in fields)
    ],
)
def test_an_adapter_attends_as_the_torch_loop_does(name, kind, case):
    for heads in HEADS[1:2] if name in ("flex", "triton") else HEADS:
        check(BACKENDS[name](), *CASES[case], heads, KINDS[kind])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=5),
    st.sampled_from(["flash_attn", "flashinfer", "varlen"]),
    st.sampled_from(["plain", "window", "sinks"]),
    st.booleans(),
)
def test_an_adapter_is_correct_for_any_sequences(sequences, name, kind, shared):
    lengths = [length for length, _ in sequences]
    contexts = [length + before for length, before in sequences]
    check(BACKENDS[name](), lengths, contexts, (4, 2), KINDS[kind], shared=shared)


@pytest.mark.parametrize("kind", ["window", "chunks"])
def test_flex_does_not_look_at_blocks_that_no_query_sees(kind):
    """By then, their place in the table may hold a later block of the sequence."""
    metadata, options = make_metadata((1, 3, 2), (20, 9, 17)), make_options(KINDS[kind], 4)
    query, cache = torch.randn(6, 4, WIDTH), make_cache(2)
    wanted = TorchLoopAttention().attend(query, *cache, metadata, options)
    unseen = list(unseen_blocks(metadata, options, BLOCK_SIZE))
    assert len(unseen) >= 5
    for sequence, block in unseen:
        newest = metadata.kernel.host.block_tables[sequence, (metadata.context_lens[sequence] - 1) // BLOCK_SIZE]
        metadata.kernel.host.block_tables[sequence, block] = newest
    torch.testing.assert_close(BACKENDS["flex"]().attend(query, *cache, metadata, options), wanted)


def test_flex_is_correct_for_blocks_that_sequences_share():
    check(BACKENDS["flex"](), (3, 1, 2), (9, 8, 11), (4, 2), {}, shared=True)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 40)), min_size=1, max_size=4),
    st.none() | st.integers(1, 200),
)
def test_tiles_hold_every_query_once_and_the_blocks_that_it_sees(sequences, window):
    lengths = np.array([length for length, _ in sequences], dtype=np.int32)
    contexts = np.array([length + before for length, before in sequences], dtype=np.int32)
    block_size, width = 16, int(-(-contexts.max() // 16))
    tables = np.arange(len(lengths) * width, dtype=np.int32)[::-1].reshape(len(lengths), width).copy()
    host, options = HostSequences(lengths, contexts, tables), AttentionOptions(1.0, window)
    tiles = make_tiles(host, tables.size, block_size, torch.device("cpu"), options)
    assert tiles.size <= 128
    assert tiles.rows.flatten()[tiles.places].tolist() == list(range(lengths.sum()))
    positions = [p for length, context in zip(lengths, contexts, strict=True) for p in range(context - length, context)]
    assert tiles.positions.flatten()[tiles.places].tolist() == positions
    mask = make_mask(tiles, tables.size, block_size, options)
    for tile, count in enumerate(mask.kv_num_blocks.flatten().tolist()):
        visited = mask.kv_indices[tile, 0, 0, :count].tolist()
        owner = np.searchsorted(np.cumsum(lengths), int(tiles.rows[tile, 0]), side="right")
        first = options.span.first_visible(int(tiles.positions[tile].min())) // block_size
        last = int(tiles.positions[tile].max()) // block_size
        assert visited == tables[owner, first : last + 1].tolist()
        assert tiles.logical[tile, visited].tolist() == list(range(first, last + 1))
        assert int((tiles.logical[tile] >= 0).sum()) == count


def test_steps_of_decodes_are_tiles_of_one_row():
    metadata = make_metadata((1, 1), (3, 9))
    tiles = make_tiles(metadata.kernel.host, NUM_BLOCKS, BLOCK_SIZE, torch.device("cpu"), AttentionOptions(1.0))
    assert tiles.size == 1


def test_flashinfer_plans_each_kind_of_layer_once_per_step():
    library = cuda_fakes.FlashInfer()
    backend = FlashInferAttention(library, torch.device("cpu"))
    query, cache = torch.randn(2, 4, WIDTH), make_cache(2)
    for step in range(3):
        metadata = make_metadata((1, 1), (3 + step, 9))
        for window in (None, 4, None, 4):
            options = AttentionOptions(0.4, sliding_window=window)
            wanted = TorchLoopAttention().attend(query, *cache, metadata, options)
            torch.testing.assert_close(backend.attend(query, *cache, metadata, options), wanted)
    assert [(wrapper.plans, wrapper.runs) for wrapper in library.wrappers] == [(3, 6), (3, 6)]


def test_pages_are_the_used_part_of_the_tables():
    host = HostSequences(np.ones(3, np.int32), np.array([4, 5, 1], np.int32), np.array([[7, 0], [3, 5], [2, 9]]))
    indptr, indices, last = pages_of(host, 4)
    assert indptr.tolist() == [0, 1, 3, 4]
    assert indices.tolist() == [7, 3, 5, 2]
    assert last.tolist() == [4, 1, 1]
