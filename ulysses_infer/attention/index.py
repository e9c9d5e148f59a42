"""Learned sparse attention: an index scores all cached keys for each query token, which attends to the best `top_k`.

The score of a key `k` for a token with index queries `q_h` and weights `w_h` is Σ_h w_h relu(q_h · k) (DeepSeek-V3.2).
A selection consists of cache slots. Attention treats each token as a sequence of its own whose blocks are single slots,
so every backend reads it as it is. Equal scores are decided by position, the earlier first, so that the selection is
the same on every rank that computes it and does not depend on how a library sorts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

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


@dataclass(frozen=True)
class Selection:
    """The keys that each token of a step attends to: as metadata of sequences of one token; None: all earlier ones."""

    metadata: AttentionMetadata | None = None


def needs_selection(metadata: AttentionMetadata, top_k: int) -> bool:
    """Whether a sequence of the step is longer than `top_k`, or may be when a captured step is replayed."""
    kernel = metadata.kernel
    return (max(metadata.context_lens, default=0) if kernel is None else kernel.max_context_len) > top_k


def top_slots(queries: IndexQueries, keys: torch.Tensor, metadata: AttentionMetadata, rows: Span) -> torch.Tensor:
    """The slots of the best keys of each token in `rows` of the batch, in order of position.

    keys: [blocks, size, 1, d], the index keys of the layer. Returns [t, top_k + 1] int32: slots, of which the first n
    are selected, and n in the last column.
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
        )
    found = torch.zeros(rows.size, queries.top_k + 1, dtype=torch.int32, device=keys.device)
    ends = list(accumulate(metadata.query_lens))
    for index, end in enumerate(ends):
        first, last = max(end - metadata.query_lens[index], rows.start), min(end, rows.stop)
        if first < last:
            context, local = metadata.context_lens[index], slice(first - rows.start, last - rows.start)
            positions = torch.arange(context - end + first, context - end + last, device=keys.device)
            own = IndexQueries(queries.query[local], queries.weights[local], queries.top_k)
            found[local] = _of_sequence(own, keys, metadata.block_tables[index], positions)
    return found


def _of_sequence(
    queries: IndexQueries, keys: torch.Tensor, table: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """`top_slots` of the last tokens of one sequence, at `positions` [n]. table: its blocks."""
    size, context, top_k = keys.shape[1], int(positions[-1]) + 1, queries.top_k
    blocks = table[: ceil_div(context, size)].long()
    cached = keys.index_select(0, blocks).flatten(0, 2)[:context].float()
    best = torch.cat([_best(part, cached, top_k) for part in _chunks(queries, positions, context)])
    slots = blocks[best // size] * size + best % size
    padded = torch.nn.functional.pad(slots, (0, top_k + 1 - slots.shape[1]))
    padded[:, top_k] = torch.clamp(positions + 1, max=top_k)
    return padded.to(torch.int32)


def _chunks(
    queries: IndexQueries, positions: torch.Tensor, context: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Query, weights and positions of as many tokens as are scored at a time."""
    count = max(1, SCORES_PER_CALL // (queries.query.shape[1] * context))
    parts = (queries.query.split(count), queries.weights.split(count), positions.split(count))
    yield from zip(*parts, strict=True)


def _best(part: tuple[torch.Tensor, torch.Tensor, torch.Tensor], keys: torch.Tensor, top_k: int) -> torch.Tensor:
    """The positions of the best keys, ascending: [n, min(top_k, m)]. keys: [m, d].

    Tokens at fewer than `top_k` positions get later ones too, which are last.
    """
    query, weights, positions = part
    each = torch.relu(torch.matmul(query.float(), keys.t()))  # [n, H, m]
    scores = torch.matmul(weights[:, None], each).squeeze(1) + 0.0  # -0.0 becomes 0.0
    at = torch.arange(keys.shape[0], device=keys.device)
    bits = scores.masked_fill(at > positions[:, None], float("-inf")).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & LAST)).long()  # as integers in the order of the scores
    unique = (ordered << 32) + (LAST - at)
    best = LAST - (unique.topk(min(top_k, keys.shape[0]), dim=1).values & 0xFFFFFFFF)
    return best.sort(dim=1).values


def selected(found: torch.Tensor, metadata: AttentionMetadata) -> AttentionMetadata:
    """found: what `top_slots` returns for all tokens of the step. Each becomes a sequence in blocks of one slot."""
    count, top_k = found.shape[0], found.shape[1] - 1
    if metadata.kernel is None:
        return AttentionMetadata(metadata.slots, [1] * count, _lengths(metadata, top_k), found[:, :top_k].long())
    tables, lengths = found[:, :top_k], found[:, top_k].contiguous()
    starts = _starts(metadata, count)
    nothing = np.zeros((0, 0), np.int32)  # what the device selects cannot be planned on the host
    host = HostSequences(nothing.ravel(), nothing.ravel(), nothing)
    # Kernels that are planned on the host, which alone read the sums of context lengths, are not chosen.
    kernel = KernelSequences(starts, starts, lengths, tables, 1, top_k, host, captured=metadata.kernel.captured)
    lists: tuple[list[int], list[int]] = ([], [])
    if metadata.query_lens:  # not a captured step
        lists = [1] * count, _lengths(metadata, top_k)
    return AttentionMetadata(metadata.slots, *lists, tables, kernel)


def _lengths(metadata: AttentionMetadata, top_k: int) -> list[int]:
    """The number of keys that each token of the step attends to; the same for all layers."""
    made: list[int] | None = metadata.prepared.get((Selection, top_k))
    if made is None:
        pairs = zip(metadata.query_lens, metadata.context_lens, strict=True)
        seen = (range(context - length + 1, context + 1) for length, context in pairs)
        made = metadata.prepared[Selection, top_k] = [min(top_k, number) for each in seen for number in each]
    return made


def _starts(metadata: AttentionMetadata, count: int) -> torch.Tensor:
    """0, 1, ... [count + 1] int32: a constant, which captured steps may share."""
    made: torch.Tensor | None = metadata.prepared.get(Selection)
    if made is None:
        made = torch.arange(count + 1, dtype=torch.int32, device=metadata.slots.device)
        metadata.prepared[Selection] = made
    return made
