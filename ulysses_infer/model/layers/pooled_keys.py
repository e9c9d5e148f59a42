"""The index of an attention layer over pools: one key for several consecutive tokens (Qwen4-Exp, GLM-5-Next).

The key of a pool is made of *parts*, one per token, which the index computes from the token alone. Both are cached at
the tokens' slots: the key of a complete pool replaces the part of its last token, which nothing reads again. So a step
writes only to slots of its own tokens, and blocks that requests share may end within a pool.

Parallelism: as in `key_index.py`. Every rank caches the parts of all tokens and pools them itself.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch.nn import functional as F

from ulysses_infer.attention.backend import AttentionMetadata, KernelSequences
from ulysses_infer.attention.index import IndexQueries, Selection
from ulysses_infer.model.context import StepContext, step_context
from ulysses_infer.model.layers.key_index import best_keys, of_all_tokens
from ulysses_infer.model.sampling.transfer import to_device_async


class PoolingIndex(Protocol):
    """The index of a layer, with what differs between families."""

    layer_idx: int
    pool: int
    """Tokens of a pool."""
    top_k: int
    """Pools to select."""
    cached_width: int
    """Width of a part; a key is at most as wide."""

    def pool_keys(self, parts: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """parts: [m, pool, width]; starts: [m], the position of each pool's first token; returns keys [m, d]."""
        ...


class Pools(NamedTuple):
    """Pools whose last tokens are in a step."""

    slots: torch.Tensor
    """[m, pool] int64: the slots of their tokens."""
    starts: torch.Tensor
    """[m] int64: the positions of their first tokens."""
    is_complete: torch.Tensor | None
    """[m] bool, in captured steps, which have a row per token; None: all are complete."""


def select_pools(index: PoolingIndex, query: torch.Tensor, weights: torch.Tensor, parts: torch.Tensor) -> Selection:
    """Store the parts of the step's tokens and the keys of complete pools, then select for every token of the step.

    Of this rank's tokens: query [t, H, d]; weights [t, H], see `IndexQueries`; parts [t, width].
    """
    context = step_context()
    count = context.num_local_tokens
    _store(context, index, of_all_tokens(context, parts[:count]))
    queries = IndexQueries(query[:count].to(parts.dtype), weights[:count].float().contiguous(), index.top_k, index.pool)
    return best_keys(context, index.layer_idx, queries)


def _store(context: StepContext, index: PoolingIndex, parts: torch.Tensor) -> None:
    """parts: [T, width]."""
    layer, cache = index.layer_idx, context.cache
    metadata = context.attention_of(layer)
    cache.write_index(layer, metadata.slots, parts)
    cached = cache.index_keys[layer]
    pools = pools_of(metadata, index.pool, cached.shape[1])
    if not len(pools.slots):
        return
    members = cached.flatten(0, 2).index_select(0, pools.slots.flatten()).unflatten(0, (-1, index.pool))
    keys = index.pool_keys(members, pools.starts)
    rows = F.pad(keys, (0, index.cached_width - keys.shape[1]))
    if pools.is_complete is not None:
        rows = torch.where(pools.is_complete[:, None], rows, parts)
    cache.write_index(layer, pools.slots[:, -1].contiguous(), rows)


def pools_of(metadata: AttentionMetadata, pool: int, block_size: int) -> Pools:
    """The pools that the tokens of a step complete; in a captured step, one for each token."""
    if metadata.kernel is not None and not metadata.query_lens:
        sequences, last = _of_every_token(metadata.kernel, len(metadata.slots))
        positions = _members(last, pool).clamp(min=0)
        slots = _slots(metadata.kernel.block_tables, sequences, positions, block_size)
        slots[:, -1] = metadata.slots  # also of padding
        return Pools(slots, positions[:, 0], last % pool == pool - 1)
    made: Pools | None = metadata.prepared.get((Pools, pool))
    if made is None:
        ends = [
            (sequence, last)
            for sequence, (length, context) in enumerate(zip(metadata.query_lens, metadata.context_lens, strict=True))
            for last in range((context - length) // pool * pool + pool - 1, context, pool)
        ]
        sequences, last = to_device_async(ends, metadata.slots, torch.int64).view(-1, 2).unbind(1)
        positions = _members(last, pool)
        made = Pools(_slots(metadata.block_tables, sequences, positions, block_size), positions[:, 0], None)
        metadata.prepared[Pools, pool] = made
    return made


def _of_every_token(sequences: KernelSequences, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence and the position of each of `count` tokens, from what a captured step finds on the device."""
    rows = torch.arange(count, device=sequences.context_lens.device)
    found = torch.searchsorted(sequences.cu_query_lens, rows, right=True).clamp(max=sequences.num_sequences) - 1
    after = sequences.cu_query_lens.index_select(0, found + 1) - rows
    return found, (sequences.context_lens.index_select(0, found) - after).long()


def _members(last: torch.Tensor, pool: int) -> torch.Tensor:
    """The positions of the tokens of pools that end at `last` [m]: [m, pool]."""
    return last[:, None] + torch.arange(1 - pool, 1, device=last.device)


def _slots(tables: torch.Tensor, sequences: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """tables: [N, blocks]; sequences: [m]; positions: [m, pool]; returns [m, pool] int64."""
    return tables[sequences[:, None], positions // block_size].long() * block_size + positions % block_size
