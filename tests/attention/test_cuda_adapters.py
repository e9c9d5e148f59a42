"""The adapters to GPU attention libraries, over stand-ins of the libraries, compared with the torch loop."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention import cuda_fakes
from ulysses_infer.attention.backend import (
    AttentionMetadata,
    AttentionOptions,
    HostSequences,
    KernelSequences,
    running_sums,
)
from ulysses_infer.attention.flash_attn import FlashAttnAttention
from ulysses_infer.attention.flashinfer import FlashInferAttention, pages_of
from ulysses_infer.attention.torch_loop import TorchLoopAttention

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
    "alibi": {"alibi": True},
    "window and alibi": {"sliding_window": 7, "alibi": True},
}


def triton_attention():
    """Our own kernel, in Triton's interpreter."""
    pytest.importorskip("triton")
    from ulysses_infer.attention.triton import TritonAttention

    return TritonAttention()


BACKENDS = {
    "flash_attn": lambda: FlashAttnAttention(cuda_fakes.flash_attn_varlen_func),
    "flashinfer": lambda: FlashInferAttention(cuda_fakes.FlashInfer(), torch.device("cpu")),
    "triton": triton_attention,
}
CANNOT = {("flash_attn", "chunk_size"), ("flashinfer", "chunk_size"), ("flashinfer", "alibi")}


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
    slopes = torch.linspace(0.5, 0.01, heads, device=device) if kind.get("alibi") else None
    return AttentionOptions(**{"scaling": 0.4, **kind, "sinks": sinks, "alibi": slopes})


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
    for heads in HEADS[1:2] if name == "triton" else HEADS:
        check(BACKENDS[name](), *CASES[case], heads, KINDS[kind])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=5),
    st.sampled_from(["flash_attn", "flashinfer"]),
    st.sampled_from(["plain", "window", "sinks"]),
    st.booleans(),
)
def test_an_adapter_is_correct_for_any_sequences(sequences, name, kind, shared):
    lengths = [length for length, _ in sequences]
    contexts = [length + before for length, before in sequences]
    check(BACKENDS[name](), lengths, contexts, (4, 2), KINDS[kind], shared=shared)


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
