"""Which entries a step completes and which its tokens see, against a plain computation for each token."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.attention import entries as module
from ulysses_infer.attention.backend import AttentionMetadata, HostSequences, KernelSequences, running_sums
from ulysses_infer.attention.entries import best_entries, completed_entries, visible_entries, with_window
from ulysses_infer.attention.index import IndexQueries
from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.parallel.layout import Span

SHAPES = [(4, 2), (4, 4), (4, 8), (3, 6), (6, 3)]  # block size, tokens per entry
WINDOW, FIRST_SLOT = 5, 1000


class Text(NamedTuple):
    """A sequence of a step: its number of tokens, how many of them are in the step, its blocks in two groups."""

    length: int
    query: int
    entry_blocks: list[int]
    window_blocks: list[int]

    @property
    def positions(self) -> range:
        return range(self.length - self.query, self.length)


def texts(seed: int, block_size: int) -> list[Text]:
    draw = random.Random(seed)
    made = []
    for _ in range(draw.randint(1, 4)):
        length = draw.randint(1, 40)
        blocks = -(-length // block_size)
        made.append(
            Text(length, draw.randint(1, length), draw.sample(range(100), blocks), draw.sample(range(100), blocks))
        )
    return made


def metadata(
    step: list[Text], tables: list[list[int]], starts: list[int], block_size: int, on_device: bool
) -> AttentionMetadata:
    """starts: the first block in each table."""
    width = max(len(table) - start for table, start in zip(tables, starts, strict=True))
    rows = [table[start:] + [0] * (width - len(table) + start) for table, start in zip(tables, starts, strict=True)]
    queries = [text.query for text in step]
    contexts = [text.length - start * block_size for text, start in zip(step, starts, strict=True)]
    kernel = None
    if on_device:
        host = HostSequences(np.array(queries, np.int32), np.array(contexts, np.int32), np.array(rows, np.int32))
        sums = [torch.from_numpy(running_sums(each)) for each in (host.query_lens, host.context_lens)]
        lengths, found = torch.from_numpy(host.context_lens), torch.from_numpy(host.block_tables)
        kernel = KernelSequences(*sums, lengths, found, max(queries), max(contexts), host)
    slots = torch.zeros(sum(queries), dtype=torch.int64)
    return AttentionMetadata(slots, queries, contexts, torch.tensor(rows), kernel)


def groups(
    step: list[Text], block_size: int, span: int, on_device: bool
) -> tuple[AttentionMetadata, AttentionMetadata]:
    """Of the group of entries, and of one with windows of `span` tokens."""
    limited = AttentionSpan(sliding_window=span)
    starts = limited.table_starts(np.array([text.positions[0] for text in step]), block_size).tolist()
    return (
        metadata(step, [text.entry_blocks for text in step], [0] * len(step), block_size, on_device),
        metadata(step, [text.window_blocks for text in step], starts, block_size, on_device),
    )


def slot_of_token(blocks: list[int], position: int, block_size: int) -> int:
    return blocks[position // block_size] * block_size + position % block_size


def slot_of_entry(blocks: list[int], number: int, tokens: int, block_size: int) -> int:
    per_block = max(1, block_size // tokens)
    return blocks[((number + 1) * tokens - 1) // block_size] * per_block + number % per_block


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("block_size", "tokens"), SHAPES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), overlaps=st.booleans())
def test_a_step_completes_the_entries_whose_last_tokens_it_has(
    block_size: int, tokens: int, on_device: bool, seed: int, overlaps: bool
) -> None:
    step, reach = texts(seed, block_size), tokens * (1 + overlaps)
    entries, inputs = groups(step, block_size, reach, on_device)
    done = completed_entries(entries, inputs, tokens, reach, block_size, scratch_block=0)
    ends = [(text, end) for text in step for end in text.positions if (end + 1) % tokens == 0]
    if not ends:
        assert done is None
        return
    assert done is not None
    assert done.numbers.tolist() == [(end + 1) // tokens - 1 for _, end in ends]
    assert done.slots.tolist() == [
        slot_of_entry(text.entry_blocks, (end + 1) // tokens - 1, tokens, block_size) for text, end in ends
    ]
    for row, (text, end) in enumerate(ends):
        made_of = range(end + 1 - reach, end + 1)
        assert done.exists[row].tolist() == [position >= 0 for position in made_of]
        found = done.inputs[row][done.exists[row]].tolist()
        assert found == [slot_of_token(text.window_blocks, at, block_size) for at in made_of if at >= 0]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("block_size", "tokens"), SHAPES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_tokens_attend_to_their_window_and_to_all_complete_entries(
    block_size: int, tokens: int, on_device: bool, seed: int
) -> None:
    step = [*texts(seed, block_size), Text(tokens, 1, list(range(9)), list(range(9, 18)))]
    entries, window = groups(step, block_size, WINDOW, on_device)
    most = max(text.length for text in step) // tokens
    find = visible_entries(entries, tokens, block_size)
    made = with_window(find, most, window, entries, WINDOW, tokens, block_size, FIRST_SLOT)
    tables = made.block_tables if made.kernel is None else made.kernel.block_tables
    expected = [wanted(text, at, tokens, block_size) for text in step for at in text.positions]
    assert made.query_lens == [1] * len(expected)
    assert made.context_lens == list(map(len, expected))
    assert [row[: len(slots)].tolist() for row, slots in zip(tables, expected, strict=True)] == expected
    if made.kernel is not None:
        assert made.kernel.context_lens.tolist() == made.context_lens


def wanted(text: Text, position: int, tokens: int, block_size: int) -> list[int]:
    """The slots that a token attends to."""
    window = range(max(0, position + 1 - WINDOW), position + 1)
    numbers = range((position + 1) // tokens)
    return [slot_of_token(text.window_blocks, at, block_size) for at in window] + [
        FIRST_SLOT + slot_of_entry(text.entry_blocks, number, tokens, block_size) for number in numbers
    ]


@pytest.mark.parametrize(("block_size", "tokens"), SHAPES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_index_selects_the_entries_with_the_highest_scores(block_size: int, tokens: int, seed: int) -> None:
    step, top_k = texts(seed, block_size), 3
    entries, _ = groups(step, block_size, WINDOW, on_device=False)
    generator = torch.Generator().manual_seed(seed)
    count = len(entries.slots)
    query, weights = torch.rand(count, 4, 8, generator=generator), torch.rand(count, 4, generator=generator)
    keys = torch.rand(100, max(1, block_size // tokens), 1, 8, generator=generator)
    rows = Span(count // 3, count)
    part = IndexQueries(query[rows.start :], weights[rows.start :], top_k)
    found = best_entries(part, keys, entries, tokens, block_size, rows)
    each = [(text, at) for text in step for at in text.positions]
    for row, (text, at) in list(enumerate(each))[rows.start :]:
        slots = [slot_of_entry(text.entry_blocks, e, tokens, block_size) for e in range((at + 1) // tokens)]
        scores = (torch.relu(keys.flatten(0, 2)[slots] @ query[row].t()) * weights[row]).sum(dim=1)
        best = {slots[index] for index in scores.topk(min(top_k, len(slots))).indices.tolist()}
        own = found[row - rows.start].tolist()
        assert own[-1] == min(top_k, len(slots))
        assert set(own[: own[-1]]) == best


def test_tables_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    step = texts(3, 4)
    entries, window = groups(step, 4, WINDOW, on_device=False)
    arguments = (max(text.length for text in step) // 2, window, entries, WINDOW, 2, 4, FIRST_SLOT)
    whole = with_window(visible_entries(entries, 2, 4), *arguments)
    monkeypatch.setattr(module, "TABLE_ELEMENTS", 1)
    assert torch.equal(with_window(visible_entries(entries, 2, 4), *arguments).block_tables, whole.block_tables)
