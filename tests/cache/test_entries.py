"""Entries of several tokens beside keys and values: where they lie, what they take, how far back they are kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.attention.entries import entry_tables
from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.cache.entries import EntryShape
from ulysses_infer.cache.groups import CacheGroups
from ulysses_infer.cache.paged import CacheShape, LayerShape, PagedCache
from ulysses_infer.cache.sizing import CacheSizing
from ulysses_infer.errors import ConfigError

CPU = torch.device("cpu")
WINDOW = AttentionOptions(1.0, sliding_window=8)
ENTRIES = (
    EntryShape(0, "inputs", 6, span=AttentionSpan(sliding_window=4)),
    EntryShape(0, "keys", 2, tokens=2, is_joined=True),
    EntryShape(1, "keys", 3, tokens=8),
)
SHAPE = CacheShape(
    (LayerShape(1, 2, 2, values_in_keys=True), LayerShape(1, 2, 2)),
    block_size=4,
    dtype=torch.bfloat16,
    entries=ENTRIES,
    entry_dtype=torch.float32,
)
GROUPS = CacheGroups.of([WINDOW, WINDOW], 100, [entry.span for entry in ENTRIES])


def test_entries_are_kept_as_far_back_as_they_are_read() -> None:
    assert GROUPS.attention_spans == (AttentionSpan(), AttentionSpan(8), AttentionSpan(4))
    assert GROUPS.of_layer == (1, 1)
    assert GROUPS.of_entries == (2, 0, 0)


def test_the_budget_counts_entries() -> None:
    cache = PagedCache(SHAPE, (7, 5, 3), CPU, groups=GROUPS)
    per_block = [2 * 2 * 2 + 3 * 4, 4 * 2 * 2 + 4 * 4 * 2, 4 * 6 * 4]
    assert [SHAPE.bytes_of_group(GROUPS, group) for group in range(3)] == per_block
    assert cache.num_bytes == sum(count * size for count, size in zip((7, 5, 3), per_block, strict=True))
    assert CacheSizing(SHAPE, GROUPS, 100, 2, 16).num_bytes((7, 5, 3)) == cache.num_bytes
    held = [cache.keys[0], *cache.entries.values(), cache.keys[1], cache.values[1]]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == cache.num_bytes


def test_joined_entries_are_slots_behind_the_keys_of_their_layer() -> None:
    cache = PagedCache(SHAPE, (7, 5, 3), CPU, scratch_blocks=1, groups=GROUPS)
    keys, entries = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), torch.tensor([[5.0, 6.0]])
    cache.write(0, torch.tensor([0, 19]), keys, keys)
    cache.write_entries(0, "keys", torch.tensor([13]), entries)
    slots, values = cache.slots_of_layer(0)
    first = cache.first_joined_slot(0)
    assert first == 6 * 4
    assert len(slots) == first + 8 * 2
    assert slots[[0, 19, first + 13], 0, 0].tolist() == values[[0, 19, first + 13], 0, 0].tolist()
    assert slots[[0, 19, first + 13], 0, 0].tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert len(cache.slots_of_layer(1)[0]) == 6 * 4


def test_entries_that_are_not_joined_have_their_own_dtype() -> None:
    cache = PagedCache(SHAPE, (7, 5, 3), CPU, groups=GROUPS)
    rows = torch.tensor([[1.0, 2.0, 1.0 + 2.0**-20]])
    cache.write_entries(1, "keys", torch.tensor([6]), rows)
    assert torch.equal(cache.entries[1, "keys"].flatten(0, 2)[6:], rows)


@given(st.integers(1, 5), st.integers(0, 4), st.booleans(), st.integers(1, 40))
def test_every_entry_lies_in_the_block_of_its_last_token(size: int, power: int, longer: bool, number: int) -> None:
    tokens, block_size = (size << power, size) if longer else (size, size << power)
    entry = EntryShape(0, "keys", 1, tokens)
    entry.check_block_size(block_size)
    per_block, last = entry.per_block(block_size), number * tokens - 1
    table = torch.arange(100, 100 + last // block_size + 1)[None]
    found = entry_tables(table, tokens, block_size)[0, (number - 1) // per_block]
    assert found == 100 + last // block_size
    assert entry_tables(table, tokens, block_size).shape[1] * per_block >= number


def test_blocks_that_entries_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError) as failure:
        EntryShape(3, "keys", 1, tokens=4).check_block_size(6)
    assert str(failure.value) == (
        "cache.block_size is 6, but layer 3 caches one entry per 4 tokens; use a multiple or a divisor of 4"
    )
