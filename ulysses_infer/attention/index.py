"""Learned sparse attention: an index scores all cached keys for each query token, which attends to the best `top_k`.

The score of a key `k` for a token with index queries `q_h` and weights `w_h` is Σ_h w_h relu(q_h · k) (DeepSeek-V3.2).
A key may stand for a *pool* of consecutive tokens (Qwen4-Exp, GLM-5-Next). It lies at the slot of its last token. A
token then attends to all tokens of the best pools, and to those after the last complete pool.

A selection consists of cache slots. Attention treats each token as a sequence of its own whose blocks are single slots,
so every backend reads it as it is. Equal scores are decided by position, the earlier first, so that the selection is
the same on every rank that computes it and does not depend on how a library sorts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch.nn import functional as F

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.attention.backend import AttentionMetadata, HostSequences, KernelSequences
from ulysses_infer.kernels.launch import runs_kernels
from ulysses_infer.parallel.layout import Span

SCORES_PER_CALL = 1 << 24  # bounds the scores of all index heads to 64 MiB of float32
SCRATCH_BYTES = 1 << 29
"""What an index takes during a step: scores, and the slots of 8192 tokens with 2048 selected keys, twice."""
LAST = (1 << 31) - 1


@dataclass(frozen=True)
class IndexQueries:
    """What the index computes for some tokens. query: [t, H, d]; weights: [t, H] float32, with all factors."""

    query: torch.Tensor
    weights: torch.Tensor
    top_k: int
    """Keys to select."""
    pool: int = 1
    """Tokens per key."""


@dataclass(frozen=True)
class Selection:
    """The keys that each token of a step attends to: as metadata of sequences of one token; None: all earlier ones."""

    metadata: AttentionMetadata | None = None


def needs_selection(metadata: AttentionMetadata, top_k: int, pool: int = 1) -> bool:
    """Whether a sequence of the step has more than `top_k` keys, or may have when a captured step is replayed."""
    kernel = metadata.kernel
    return (max(metadata.context_lens, default=0) if kernel is None else kernel.max_context_len) // pool > top_k


def top_slots(queries: IndexQueries, keys: torch.Tensor, metadata: AttentionMetadata, rows: Span) -> torch.Tensor:
    """The slots of the best keys of each token in `rows` of the batch, in order of position.

    keys: [blocks, size, 1, at least d], the index keys of the layer. Returns [t, (top_k + 1) * pool] int32: slots, of
    which the first n are selected, and n in the last column.
    """
    if metadata.kernel is not None and runs_kernels(keys.device):
        from ulysses_infer.kernels.index import top_slots as launch_top_slots

        kernel = metadata.kernel
        return launch_top_slots(
            queries.query,
            queries.weights,
            keys,
            kernel.cu_query_lens,
            kernel.context_lens,
            kernel.block_tables,
            kernel.max_context_len,
            queries.top_k,
            rows.start,
            queries.pool,
        )
    found = torch.zeros(rows.size, (queries.top_k + 1) * queries.pool, dtype=torch.int32, device=keys.device)
    ends = list(accumulate(metadata.query_lens))
    for index, end in enumerate(ends):
        first, last = max(end - metadata.query_lens[index], rows.start), min(end, rows.stop)
        if first < last:
            context, local = metadata.context_lens[index], slice(first - rows.start, last - rows.start)
            positions = torch.arange(context - end + first, context - end + last, device=keys.device)
            own = replace(queries, query=queries.query[local], weights=queries.weights[local])
            found[local] = of_sequence(own, keys, metadata.block_tables[index], positions)
    return found


def of_sequence(
    queries: IndexQueries, keys: torch.Tensor, table: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """`top_slots` of the last tokens of one sequence, at `positions` [n]. table: its blocks."""
    size, context, pool = keys.shape[1], int(positions[-1]) + 1, queries.pool
    blocks = table[: ceil_div(context, size)].long()
    cached = keys.index_select(0, blocks).flatten(0, 2)[pool - 1 : context : pool, : queries.query.shape[2]].float()
    seen = positions + 1
    best = torch.cat([_best(part, cached, queries.top_k) for part in _chunks(queries, seen // pool, len(cached))])
    at = _tokens(best, seen, pool)
    found = F.pad(blocks[at // size] * size + at % size, (0, (queries.top_k + 1) * pool - at.shape[1]))
    found[:, -1] = torch.clamp(seen // pool, max=queries.top_k) * pool + seen % pool
    return found.to(torch.int32)


def _tokens(best: torch.Tensor, seen: torch.Tensor, pool: int) -> torch.Tensor:
    """The positions of the tokens of the `best` keys [n, k], then of those after the last complete pool: [n, m].

    seen: [n], how many tokens each sees. Positions behind those are its last one.
    """
    if pool == 1:
        return torch.minimum(best, seen[:, None] - 1)
    pools = F.pad(best, (0, 1), value=LAST).minimum((seen // pool)[:, None])
    each = pools[..., None] * pool + torch.arange(pool, device=best.device)
    return torch.minimum(each.flatten(1)[:, :-1], seen[:, None] - 1)


def _chunks(
    queries: IndexQueries, counts: torch.Tensor, most: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Query, weights and the number of keys of as many tokens as are scored at a time. most: of the keys."""
    rows = max(1, SCORES_PER_CALL // (queries.query.shape[1] * max(1, most)))
    parts = (queries.query.split(rows), queries.weights.split(rows), counts.split(rows))
    yield from zip(*parts, strict=True)


def _best(part: tuple[torch.Tensor, torch.Tensor, torch.Tensor], keys: torch.Tensor, top_k: int) -> torch.Tensor:
    """The numbers of the best keys, ascending: [n, min(top_k, m)]. keys: [m, d].

    Tokens that see fewer than `top_k` get later ones too, which are last.
    """
    query, weights, counts = part
    each = torch.relu(torch.matmul(query.float(), keys.t()))  # [n, H, m]
    scores = torch.matmul(weights[:, None], each).squeeze(1) + 0.0  # -0.0 becomes 0.0
    at = torch.arange(keys.shape[0], device=keys.device)
    bits = scores.masked_fill(at >= counts[:, None], float("-inf")).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & LAST)).long()  # as integers in the order of the scores
    unique = (ordered << 32) + (LAST - at)
    best = LAST - (unique.topk(min(top_k, keys.shape[0]), dim=1).values & 0xFFFFFFFF)
    return best.sort(dim=1).values


def selected(found: torch.Tensor, metadata: AttentionMetadata, pool: int = 1) -> AttentionMetadata:
    """found: what `top_slots` returns for all tokens of the step. Each becomes a sequence in blocks of one slot."""
    return one_by_one(found, metadata, _lengths(metadata, found.shape[1] - 1, pool))


def one_by_one(found: torch.Tensor, metadata: AttentionMetadata, lengths: list[int]) -> AttentionMetadata:
    """The step's tokens as sequences of their own, in blocks of one slot.

    found: [T, m + 1] int32, slots, of which the first n are attended to, and n in the last column; lengths: the same n
    on the host, which captured steps do not need.
    """
    count, most = found.shape[0], found.shape[1] - 1
    if metadata.kernel is None:
        return AttentionMetadata(metadata.slots, [1] * count, lengths, found[:, :most].long())
    tables, contexts = found[:, :most], found[:, most].contiguous()
    starts = _starts(metadata, count)
    nothing = np.zeros((0, 0), np.int32)  # what the device selects cannot be planned on the host
    host = HostSequences(nothing.ravel(), nothing.ravel(), nothing)
    # Kernels that are planned on the host, which alone read the sums of context lengths, are not chosen.
    kernel = KernelSequences(starts, starts, contexts, tables, 1, most, host, captured=metadata.kernel.captured)
    lists: tuple[list[int], list[int]] = ([], [])
    if metadata.query_lens:  # not a captured step
        lists = [1] * count, lengths
    return AttentionMetadata(metadata.slots, *lists, tables, kernel)


def _lengths(metadata: AttentionMetadata, most: int, pool: int) -> list[int]:
    """The number of tokens that each token of the step attends to, at most `most`; the same for all layers."""
    made: list[int] | None = metadata.prepared.get((Selection, most, pool))
    if made is None:
        pairs = zip(metadata.query_lens, metadata.context_lens, strict=True)
        seen = (range(context - length + 1, context + 1) for length, context in pairs)
        whole = most + 1 - pool
        made = [min(whole, number // pool * pool) + number % pool for each in seen for number in each]
        metadata.prepared[Selection, most, pool] = made
    return made


def _starts(metadata: AttentionMetadata, count: int) -> torch.Tensor:
    """0, 1, ... [count + 1] int32: a constant, which captured steps may share."""
    made: torch.Tensor | None = metadata.prepared.get(Selection)
    if made is None:
        made = torch.arange(count + 1, dtype=torch.int32, device=metadata.slots.device)
        metadata.prepared[Selection] = made
    return made
