"""Expands the latents of long prefill chunks into keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.attention.backend import AttentionMetadata, HostSequences, KernelSequences, running_sums
from ulysses_infer.attention.plans import HostArrays

MAX_EXPANDED_BYTES = 1 << 27  # of expanded keys and values at a time: heads are processed in chunks that fit
Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class SequenceSubset:
    """A subset of a step's sequences, with metadata of its own."""

    rows: torch.Tensor  # [n] int64, indices of their tokens in the batch
    blocks: torch.Tensor  # [b], their cache blocks, sequence by sequence
    metadata: AttentionMetadata


@dataclass(frozen=True)
class LatentSplit:
    """The sequences that attend over latents, and those whose latents are expanded. Both None: none is expanded."""

    absorbed: SequenceSubset | None = None
    expanded: SequenceSubset | None = None


def split_sequences(
    metadata: AttentionMetadata, block_size: int, prefers_expansion: Callable[[int, int], bool]
) -> LatentSplit:
    """Split a step's sequences; cached in `metadata`. prefers_expansion: a function of query and context length."""
    made: LatentSplit | None = metadata.prepared.get(LatentSplit)
    if made is None:
        made = metadata.prepared[LatentSplit] = _split_sequences(metadata, block_size, prefers_expansion)
    return made


def _split_sequences(
    metadata: AttentionMetadata, block_size: int, prefers_expansion: Callable[[int, int], bool]
) -> LatentSplit:
    pairs = list(zip(metadata.query_lens, metadata.context_lens, strict=True))
    expanded = [index for index, pair in enumerate(pairs) if prefers_expansion(*pair)]
    if not expanded:
        return LatentSplit()
    others = sorted(set(range(len(pairs))) - set(expanded))
    absorbed = _subset(metadata, others, block_size, in_order=False) if others else None
    return LatentSplit(absorbed, _subset(metadata, expanded, block_size, in_order=True))


def _subset(metadata: AttentionMetadata, sequences: Sequence[int], block_size: int, in_order: bool) -> SequenceSubset:
    """`in_order`: block tables refer to a copy of the subset's blocks in order, not to the cache."""
    query_lens = np.array(metadata.query_lens)
    ends, context_lens = np.cumsum(query_lens), np.array(metadata.context_lens)[list(sequences)]
    rows = np.concatenate([np.arange(ends[index] - query_lens[index], ends[index]) for index in sequences])
    kernel, device = metadata.kernel, metadata.block_tables.device
    tables = (metadata.block_tables.numpy() if kernel is None else kernel.host.block_tables)[list(sequences)]
    used = np.arange(tables.shape[1]) < ceil_div(context_lens, block_size)[:, None]
    blocks = tables[used]
    if in_order:
        tables = np.zeros_like(tables)
        tables[used] = np.arange(len(blocks))
    own = HostSequences(query_lens[list(sequences)].astype(np.int32), context_lens.astype(np.int32), tables)
    send = HostArrays(device).on_device
    on_device, own_rows = send(tables, metadata.block_tables.dtype), send(rows, torch.int64)
    part = AttentionMetadata(
        metadata.slots[own_rows],
        own.query_lens.tolist(),
        own.context_lens.tolist(),
        on_device,
        None if kernel is None else _kernel(own, on_device),
    )
    return SequenceSubset(own_rows, send(blocks, torch.int64), part)


def _kernel(host: HostSequences, block_tables: torch.Tensor) -> KernelSequences:
    send = HostArrays(block_tables.device).on_device
    return KernelSequences(
        send(running_sums(host.query_lens)),
        send(running_sums(host.context_lens)),
        send(host.context_lens),
        block_tables,
        int(host.query_lens.max()),
        int(host.context_lens.max()),
        host,
    )


def expand_head_chunks(
    part: SequenceSubset, latents: torch.Tensor, weight: torch.Tensor, expand: Expand, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Expand the latents of `part`'s blocks, in order, into a temporary KV cache, one chunk of heads at a time.

    latents: the cache, [blocks, size, 1, cached]; weight: [H, key + value, latent]. Yields the heads, their keys
    [b, size, heads, key + rotary] and their values [b, size, heads, value].
    """
    found = latents.index_select(0, part.blocks).flatten(0, 2).to(dtype)
    size, num_heads = latents.shape[1], weight.shape[0]
    # Elements per token and head: the expanded product, then the key with its rotary part and the value.
    elements = 2 * weight.shape[1] + found.shape[1] - weight.shape[2]
    bytes_per_head = found.shape[0] * elements * found.element_size()
    count = max(1, MAX_EXPANDED_BYTES // bytes_per_head)
    for first in range(0, num_heads, count):
        heads = slice(first, first + count)
        keys, values = expand(found, weight[heads])
        yield heads, keys.unflatten(0, (-1, size)), values.unflatten(0, (-1, size))
