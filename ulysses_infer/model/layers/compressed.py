"""Attention to a sliding window, and to entries compressed from several tokens each (DeepSeek-V4's CSA and HCA).

An entry is computed from what its tokens project to, their *inputs*. Those are cached, too, as far back as an entry
needs that is not complete: like a sliding window, in a cache group of that span. So there is no state per request, and
prefixes, chunks and preemption need nothing of their own. Entries lie behind the layer's keys in memory, and a token
attends to the slots of its window and of the entries that it sees in one softmax, as with a learned index.

Parallelism. All query heads see the same entries, as they see the same key of the window: there is one head. Every rank
caches the inputs and entries of all tokens, in every mode. Under sequence parallelism a rank projects its own tokens,
and an all-gather carries their inputs (and, with an index, the slots that they select) to the other ranks. Each rank
then makes all entries of the step itself: few numbers per token, compared with their projections. Query heads and the
output projection are cut by head as in other attention layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch

from ulysses_infer.attention.backend import AttentionMetadata
from ulysses_infer.attention.entries import (
    Find,
    best_entries,
    completed_entries,
    is_captured,
    most_visible,
    visible_entries,
    with_window,
)
from ulysses_infer.attention.index import IndexQueries, Selection
from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.cache.entries import EntryShape
from ulysses_infer.model.context import StepContext, step_context
from ulysses_infer.model.layers.key_index import of_all_tokens

INPUTS, ENTRIES, INDEX_KEYS = "inputs", "entries", "index keys"


class Compression(Protocol):
    """How a layer compresses tokens."""

    tokens: int
    """Consecutive tokens per entry."""
    reach: int
    """Tokens that an entry is made of, up to its last one: `tokens`, or more if entries overlap."""
    width: int
    """Of an entry, and of the layer's keys."""
    input_width: int
    """Of what each token contributes."""
    index_width: int
    """Of the keys of the index that selects entries; 0: tokens attend to all."""
    top_k: int
    """Entries to select, with an index."""
    window: int
    """Tokens that attention sees besides."""

    def compress(self, inputs: torch.Tensor, exists: torch.Tensor, numbers: torch.Tensor) -> list[torch.Tensor]:
        """inputs: [E, reach, input width]; exists: [E, reach] bool; numbers: [E], of the entries in their texts.

        Returns entries [E, width] and, with an index, their keys [E, index width].
        """
        ...


def entry_shapes(layer: int, kind: Compression) -> tuple[EntryShape, ...]:
    """What a layer caches beside its keys."""
    shapes = (
        EntryShape(layer, INPUTS, kind.input_width, span=AttentionSpan(sliding_window=kind.reach)),
        EntryShape(layer, ENTRIES, kind.width, kind.tokens, is_joined=True),
    )
    return (*shapes, EntryShape(layer, INDEX_KEYS, kind.index_width, kind.tokens)) if kind.index_width else shapes


def select(
    layer: int, kind: Compression, inputs: torch.Tensor, queries: Callable[[], IndexQueries] | None = None
) -> Selection:
    """Store the inputs of the step's tokens and the entries that they complete; then what each token attends to.

    inputs: [t, input width], of this rank's tokens. queries: makes those of the index, for this rank's tokens; only
    called if a token sees more entries than are selected. The layer's keys are written by its attention.
    """
    context = step_context()
    cached = context.attention_of_entries(layer, INPUTS)
    own = of_all_tokens(context, inputs[: context.num_local_tokens])
    context.cache.write_entries(layer, INPUTS, cached.slots, own)
    entries = context.attention_of_entries(layer, ENTRIES)
    most = most_visible(entries, kind.tokens)
    if not most:
        return Selection()
    _complete(context, layer, kind)
    window, size = context.attention_of(layer), context.cache.shape.block_size
    if kind.index_width and most > kind.top_k:
        assert queries is not None
        found = _best(context, layer, kind, queries())
        return Selection(_joined(context, layer, kind, lambda rows: found[rows], kind.top_k))
    find = visible_entries(entries, kind.tokens, size)
    if is_captured(entries):
        return Selection(_joined(context, layer, kind, find, most))
    key = "all entries", kind.window, kind.tokens, context.cache.first_joined_slot(layer)
    if key not in window.prepared:  # the same for all layers that compress alike
        window.prepared[key] = _joined(context, layer, kind, find, most)
    return Selection(window.prepared[key])


def _joined(context: StepContext, layer: int, kind: Compression, find: Find, most: int) -> AttentionMetadata:
    """Attention to the window of each token, and to the entries that `find` finds, at most `most`."""
    entries, first_slot = context.attention_of_entries(layer, ENTRIES), context.cache.first_joined_slot(layer)
    size = context.cache.shape.block_size
    return with_window(find, most, context.attention_of(layer), entries, kind.window, kind.tokens, size, first_slot)


def _complete(context: StepContext, layer: int, kind: Compression) -> None:
    """Make and store the entries that the step's tokens complete."""
    cache, entries = context.cache, context.attention_of_entries(layer, ENTRIES)
    scratch = cache.scratch_block(cache.group_of_entries(layer, ENTRIES)) if context.is_captured else 0
    inputs = context.attention_of_entries(layer, INPUTS)
    done = completed_entries(entries, inputs, kind.tokens, kind.reach, cache.shape.block_size, scratch)
    if done is None:
        return
    rows = cache.entries[layer, INPUTS].flatten(0, 2)[done.inputs]
    for name, made in zip((ENTRIES, INDEX_KEYS), kind.compress(rows, done.exists, done.numbers), strict=False):
        cache.write_entries(layer, name, done.slots, made)


def _best(context: StepContext, layer: int, kind: Compression, queries: IndexQueries) -> torch.Tensor:
    """The best entries for every token of the step: [T, top_k + 1]."""
    count, metadata = context.num_local_tokens, context.attention_of_entries(layer, INDEX_KEYS)
    own = replace(queries, query=queries.query[:count], weights=queries.weights[:count])
    rows = context.token_spans[context.collectives.place.token_index]
    keys, size = context.cache.entries[layer, INDEX_KEYS], context.cache.shape.block_size
    return of_all_tokens(context, best_entries(own, keys, metadata, kind.tokens, size, rows))
