"""Attention over paged blocks against attention written out, one query and one head at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.attention import torch_loop
from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions, make_backend
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.errors import ConfigError

NUM_BLOCKS = 64


def naive(query, keys, values, options):
    """One sequence, float64. query: [n, Hq, d], the last n positions; keys: [m, Hkv, d]; values: [m, Hkv, dv]."""
    length, heads, _ = query.shape
    context, groups = keys.shape[0], heads // keys.shape[1]
    output = torch.zeros(length, heads, values.shape[2], dtype=torch.float64)
    for row in range(length):
        position = context - length + row
        seen = [other for other in range(position + 1) if sees(position, other, options)]
        for head in range(heads):
            own = head // groups
            scores = torch.stack([query[row, head].double() @ keys[j, own].double() for j in seen]) * options.scaling
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            if options.sinks is not None:
                scores = torch.cat([scores, options.sinks[head : head + 1].double()])
            weights = scores.softmax(0)[: len(seen)]
            output[row, head] = sum(w * values[j, own].double() for w, j in zip(weights, seen, strict=True))
    return output


def sees(position, other, options):
    inside = options.sliding_window is None or position - other < options.sliding_window
    same = options.chunk_size is None or position // options.chunk_size == other // options.chunk_size
    return inside and same


def paged(contexts, block_size, generator):
    """Block tables over shuffled blocks, padded with 0, no two sequences sharing one."""
    free = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    needed = [-(-context // block_size) for context in contexts]
    tables = torch.zeros(len(contexts), max(needed), dtype=torch.int64)
    for row, count in enumerate(needed):
        tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
    return tables


def check(lengths, contexts, heads, options, width=8, value_width=8, block_size=4, seed=0, dtype=torch.float32):
    """Run the backend on random sequences and compare each with `naive`; unused cache is NaN."""
    generator = torch.Generator().manual_seed(seed)
    query_heads, key_value_heads = heads
    keys = torch.full((NUM_BLOCKS, block_size, key_value_heads, width), float("nan"), dtype=dtype)
    values = torch.full((NUM_BLOCKS, block_size, key_value_heads, value_width), float("nan"), dtype=dtype)
    tables = paged(contexts, block_size, generator)
    sequences, slots = [], []
    for table, length, context in zip(tables, lengths, contexts, strict=True):
        key = torch.randn(context, key_value_heads, width, generator=generator).to(dtype)
        value = torch.randn(context, key_value_heads, value_width, generator=generator).to(dtype)
        where = [int(table[p // block_size]) * block_size + p % block_size for p in range(context)]
        keys.flatten(0, 1)[where], values.flatten(0, 1)[where] = key, value
        sequences.append((torch.randn(length, query_heads, width, generator=generator).to(dtype), key, value))
        slots += where[context - length :]
    metadata = AttentionMetadata(torch.tensor(slots), list(lengths), list(contexts), tables)
    query = torch.cat([query for query, _, _ in sequences])
    output = TorchLoopAttention().attend(query, keys, values, metadata, options)
    assert output.shape == (sum(lengths), query_heads, value_width)
    assert output.dtype == dtype
    wanted = torch.cat([naive(*sequence, options) for sequence in sequences])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(output.double(), wanted, atol=tolerance, rtol=tolerance)


OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "chunks": {"chunk_size": 6},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "window and sinks": {"sliding_window": 5, "sinks": True},
    "window and soft cap": {"sliding_window": 7, "softcap": 1.5},
    "all": {"sliding_window": 9, "chunk_size": 12, "softcap": 2.0, "sinks": True},
}


def make_options(name, query_heads, scaling=0.3):
    chosen = dict(OPTIONS[name])
    if chosen.pop("sinks", False):
        chosen["sinks"] = torch.linspace(-2.0, 2.0, query_heads)
    return AttentionOptions(scaling=scaling, **chosen)


BATCHES = {
    "decode": ([1], [17]),
    "first token": ([1], [1]),
    "whole prompt": ([19], [19]),
    "later chunk": ([6], [19]),
    "decodes": ([1, 1, 1], [3, 16, 25]),
    "mixed": ([1, 7, 1, 5, 12], [9, 7, 33, 21, 12]),
}


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", BATCHES)
def test_paged_attention_is_attention(batch, options, heads):
    check(*BATCHES[batch], heads, make_options(options, heads[0]))


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=4),
    name=st.sampled_from(sorted(OPTIONS)),
    block_size=st.sampled_from([1, 3, 4, 16]),
    widths=st.sampled_from([(8, 8), (12, 8), (8, 16)]),
    seed=st.integers(0, 1000),
)
def test_any_batch_over_any_blocks(sequences, name, block_size, widths, seed):
    lengths = [length for length, _ in sequences]
    contexts = [length + before for length, before in sequences]
    if sum(-(-context // block_size) for context in contexts) > NUM_BLOCKS:
        block_size = 16
    check(lengths, contexts, (4, 2), make_options(name, 4), *widths, block_size, seed)


@pytest.mark.parametrize("options", ["plain", "window", "soft cap", "sinks"])
def test_values_may_have_another_width_than_keys(options):
    check([1, 5], [12, 9], (4, 2), make_options(options, 4), width=12, value_width=8)


@pytest.mark.parametrize("options", ["plain", "window", "sinks"])
def test_bfloat16_stays_bfloat16(options):
    check([1, 7], [20, 11], (4, 2), make_options(options, 4), dtype=torch.bfloat16)


@pytest.mark.parametrize("options", ["plain", "window", "all"])
def test_long_prompts_are_attended_in_pieces(monkeypatch, options):
    """The piece is smaller than a sequence, so several are put together."""
    monkeypatch.setattr(torch_loop, "SCORES_PER_CALL", 100)
    monkeypatch.setattr(torch_loop, "MASK_PER_CALL", 100)
    check([30, 1], [40, 9], (4, 2), make_options(options, 4))


@given(
    position=st.integers(0, 60), window=st.none() | st.integers(1, 20), chunk=st.none() | st.integers(1, 20)
)
def test_the_first_visible_key_is_the_first_the_mask_shows(position, window, chunk):
    options = AttentionOptions(1.0, sliding_window=window, chunk_size=chunk)
    mask = options.visible(torch.tensor([position]), torch.arange(80))[0]
    assert mask.nonzero()[0].item() == options.first_visible(position)
    assert mask.nonzero()[-1].item() == position


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(ConfigError, match="'magic'; choose one of auto, torch"):
        make_backend("magic", torch.device("cpu"))
