"""Attention to a window of tokens and to entries of several tokens at once (`cache/entries.py`).

Here: which entries a step completes, which of them each token sees, and the metadata of attention to both. A token sees
the entries whose last token is not after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from ulysses_infer.attention.backend import AttentionMetadata
from ulysses_infer.attention.index import IndexQueries, of_sequence, one_by_one
from ulysses_infer.kernels.launch import runs_kernels
from ulysses_infer.parallel.layout import Span

TABLE_ELEMENTS = 1 << 22
"""Bounds what is computed of the tokens' own tables at a time."""
Find = Callable[[slice], torch.Tensor]
"""The entries that some tokens of a step attend to: [n, m + 1], slots in order, of which the first k count, and k."""


class StepTokens(NamedTuple):
    """The tokens of a step, as a cache group sees them."""

    sequences: torch.Tensor
    """[T] int64: the number of each token's sequence."""
    positions: torch.Tensor
    """[T] int64: the position of each token in the block table of its sequence."""
    on_host: np.ndarray | None
    """The positions on the host; None: a captured step."""


def step_tokens(metadata: AttentionMetadata) -> StepTokens:
    """The tokens of the step. Nothing is copied to the device."""
    if is_captured(metadata):
        return StepTokens(*_on_device(metadata), None)
    made: StepTokens | None = metadata.prepared.get(StepTokens)
    if made is None:
        lengths, contexts = np.array(metadata.query_lens), np.array(metadata.context_lens)
        ends = np.cumsum(lengths)
        positions = np.arange(lengths.sum()) + np.repeat(contexts - ends, lengths)
        if metadata.kernel is None:
            sequences = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
            made = StepTokens(sequences, torch.from_numpy(positions), positions)
        else:
            made = StepTokens(*_on_device(metadata), positions)
        metadata.prepared[StepTokens] = made
    return made


def is_captured(metadata: AttentionMetadata) -> bool:
    """Whether the step is captured: then what is computed here belongs to one graph and is not kept."""
    return metadata.kernel is not None and metadata.kernel.captured


def _on_device(metadata: AttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
    """`StepTokens` without the host's part."""
    kernel = metadata.kernel
    assert kernel is not None
    row = torch.arange(len(metadata.slots), dtype=torch.int32, device=metadata.slots.device)
    ends = kernel.cu_query_lens[1:].contiguous()
    sequences = torch.searchsorted(ends, row, right=True)
    return sequences, (row + kernel.context_lens[sequences] - ends[sequences]).long()


def most_visible(metadata: AttentionMetadata, tokens: int) -> int:
    """The most entries of `tokens` tokens that a token of the step sees, or may see when a captured one is replayed."""
    kernel = metadata.kernel
    return (max(metadata.context_lens, default=0) if kernel is None else kernel.max_context_len) // tokens


# -- entries that a step completes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class CompletedEntries:
    """The entries whose last tokens are in a step. In a captured step: one row per token, most of them unused."""

    numbers: torch.Tensor
    """[E] int64: counted from the beginning of the text."""
    slots: torch.Tensor
    """[E] int64: where to store them; a scratch slot for unused rows."""
    inputs: torch.Tensor
    """[E, reach] int64: the slots of what they are made of, one row per token."""
    exists: torch.Tensor
    """[E, reach] bool: whether there is such a token; not before the beginning of the text."""


def completed_entries(
    entries: AttentionMetadata, inputs: AttentionMetadata, tokens: int, reach: int, block_size: int, scratch_block: int
) -> CompletedEntries | None:
    """The entries of `tokens` tokens that the step completes; None if there is none.

    entries, inputs: of the cache groups that hold them and what they are made of, the last `reach` tokens.
    scratch_block: of the group of the entries; only used by captured steps.
    """
    key = CompletedEntries, tokens, reach
    all_of = step_tokens(entries)
    if all_of.on_host is None:
        return _completed(entries, inputs, None, tokens, reach, block_size, scratch_block)
    if key not in entries.prepared:
        count = np.count_nonzero((all_of.on_host + 1) % tokens == 0)
        others = (all_of.positions + 1) % tokens != 0
        rows = others.int().argsort(stable=True)[:count]  # unlike `nonzero`, this does not wait for the device
        entries.prepared[key] = (
            _completed(entries, inputs, rows, tokens, reach, block_size, scratch_block) if count else None
        )
    made: CompletedEntries | None = entries.prepared[key]
    return made


def _completed(
    entries: AttentionMetadata,
    inputs: AttentionMetadata,
    rows: torch.Tensor | None,
    tokens: int,
    reach: int,
    block_size: int,
    scratch_block: int,
) -> CompletedEntries:
    """rows: the tokens that complete an entry; None: not known yet."""
    sequences, positions, _ = step_tokens(entries)
    local = step_tokens(inputs).positions
    if rows is not None:
        sequences, positions, local = (each.index_select(0, rows) for each in (sequences, positions, local))
    numbers, per_block = (positions + 1) // tokens - 1, max(1, block_size // tokens)
    slots = _tables(entries)[sequences, positions // block_size].long() * per_block + numbers % per_block
    if rows is None:
        slots = torch.where((positions + 1) % tokens == 0, slots, scratch_block * per_block)
    back = torch.arange(reach - 1, -1, -1, device=positions.device)
    at = (local[:, None] - back).clamp(min=0)
    found = _tables(inputs)[sequences[:, None], at // block_size].long() * block_size + at % block_size
    return CompletedEntries(numbers, slots, found, positions[:, None] >= back)


def _tables(metadata: AttentionMetadata) -> torch.Tensor:
    """[N, blocks]."""
    return metadata.block_tables if metadata.kernel is None else metadata.kernel.block_tables


# -- entries that tokens see -----------------------------------------------------------------------------------


def entry_tables(block_tables: torch.Tensor, tokens: int, block_size: int) -> torch.Tensor:
    """The block tables of entries of `tokens` tokens: those of tokens, or every n-th column if entries are longer.

    block_tables: [N, blocks], from the first token on. Each block holds `max(1, block_size // tokens)` entries.
    """
    longer = tokens // block_size
    return block_tables if longer <= 1 else block_tables[:, longer - 1 :: longer]


def visible_entries(metadata: AttentionMetadata, tokens: int, block_size: int) -> Find:
    """All entries that each token sees. metadata: of the cache group that holds them."""
    sequences, positions, _ = step_tokens(metadata)
    number = torch.arange(most_visible(metadata, tokens), device=positions.device)
    per_block = max(1, block_size // tokens)
    tables = entry_tables(_tables(metadata), tokens, block_size)
    slots = tables[:, number // per_block].long() * per_block + number % per_block
    return lambda rows: torch.cat((slots[sequences[rows]], ((positions[rows] + 1) // tokens)[:, None]), dim=1)


def best_entries(
    queries: IndexQueries, keys: torch.Tensor, metadata: AttentionMetadata, tokens: int, block_size: int, rows: Span
) -> torch.Tensor:
    """The best entries for the tokens in `rows` of the batch, [t, top_k + 1] int32, see `Find`.

    keys: [blocks, entries per block, 1, d], the index keys. metadata: of the cache group that holds them.
    """
    sequences, positions = (each[rows.start : rows.stop] for each in step_tokens(metadata)[:2])
    counts, tables = (positions + 1) // tokens, entry_tables(_tables(metadata), tokens, block_size)
    if metadata.kernel is not None and runs_kernels(keys.device):
        return _best_on_device(queries, keys, tables, sequences, counts, most_visible(metadata, tokens))
    found = torch.zeros(rows.size, queries.top_k + 1, dtype=torch.int32, device=keys.device)
    for sequence in sequences.unique().tolist():
        own = torch.logical_and(sequences == sequence, counts > 0)
        if own.any():
            part = replace(queries, query=queries.query[own], weights=queries.weights[own])
            found[own] = of_sequence(part, keys, tables[sequence], counts[own] - 1)
    return found


def _best_on_device(
    queries: IndexQueries,
    keys: torch.Tensor,
    tables: torch.Tensor,
    sequences: torch.Tensor,
    counts: torch.Tensor,
    most: int,
) -> torch.Tensor:
    """`best_entries` by a kernel, to which every token is a sequence of its own."""
    from ulysses_infer.kernels.index import top_slots

    size = max(1, TABLE_ELEMENTS // max(1, tables.shape[1]))
    found = []
    for start in range(0, len(counts), size):
        part = slice(start, start + size)
        contexts = counts[part].int()
        firsts = torch.arange(len(contexts) + 1, dtype=torch.int32, device=keys.device)
        own = tables.index_select(0, sequences[part])
        found.append(
            top_slots(queries.query[part], queries.weights[part], keys, firsts, contexts, own, most, queries.top_k, 0)
        )
    return torch.cat(found) if found else keys.new_empty(0, queries.top_k + 1, dtype=torch.int32)


# -- attention -------------------------------------------------------------------------------------------------


def with_window(
    find: Find,
    most: int,
    metadata: AttentionMetadata,
    entries: AttentionMetadata,
    window: int,
    tokens: int,
    block_size: int,
    first_slot: int,
) -> AttentionMetadata:
    """The metadata of attention to the last `window` tokens and the entries that `find` finds, at most `most`.

    metadata, entries: of the cache groups of the layer's keys and entries. first_slot: of the entries in
    `PagedCache.slots_of_layer`.
    """
    count, size = len(metadata.slots), max(1, TABLE_ELEMENTS // (window + most))
    joined = torch.empty(count, window + most + 1, dtype=torch.int32, device=metadata.slots.device)
    for start in range(0, count, size):
        rows = slice(start, start + size)
        joined[rows] = _joined(find(rows), metadata, rows, window, block_size, first_slot)
    return one_by_one(joined, metadata, _lengths(entries, window, tokens, most))


def _joined(
    found: torch.Tensor, metadata: AttentionMetadata, rows: slice, window: int, block_size: int, first_slot: int
) -> torch.Tensor:
    """Slots of the window, then those `found`, of some tokens; then their number: [n, window + m + 1]."""
    sequences, positions = (each[rows, None] for each in step_tokens(metadata)[:2])
    seen = (positions + 1).clamp(max=window)
    column = torch.arange(window + found.shape[1] - 1, device=positions.device)
    at = torch.minimum(positions + 1 - seen + column, positions)
    slots = _tables(metadata)[sequences, at // block_size].long() * block_size + at % block_size
    behind = found[:, :-1].long().gather(1, (column - seen).clamp(0, found.shape[1] - 2)) + first_slot
    return torch.cat((torch.where(column < seen, slots, behind), seen + found[:, -1:]), dim=1)


def _lengths(entries: AttentionMetadata, window: int, tokens: int, most: int) -> list[int]:
    """How many tokens and entries each token of the step sees, on the host; empty for a captured step."""
    seen = step_tokens(entries).on_host
    if seen is None:
        return []
    key = "lengths", window, tokens, most
    if key not in entries.prepared:
        whole = np.minimum(seen + 1, window) + np.minimum((seen + 1) // tokens, most)
        entries.prepared[key] = whole.tolist()
    made: list[int] = entries.prepared[key]
    return made
