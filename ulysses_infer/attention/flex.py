"""Attention backend of torch's compiled `flex_attention`: supports all masks, soft caps and block sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions, HostSequences
from ulysses_infer.attention.sinks import with_sinks

TILE = 128  # most query rows of one tile


class Tiles(NamedTuple):
    """A step's queries divided into tiles of rows of one sequence: the batch dimension of the kernel."""

    size: int  # rows of a tile
    rows: torch.Tensor  # [B, size], the batched token in each row; padding repeats the tile's first
    places: torch.Tensor  # [T], where in the flattened tiles each batched token is
    positions: torch.Tensor  # [B, size], the row's position in its sequence
    logical: torch.Tensor  # [B, num_blocks], which block of the tile's sequence a cache block is; -1: none, or unseen
    num_blocks: torch.Tensor  # [B], blocks from the first that the tile sees up to its last position
    blocks: torch.Tensor  # [B, blocks of the longest], the cache blocks in sequence order, from the first seen on


class FlexAttention:
    """One call of `flex_attention` per layer, with the whole cache as keys; a block mask selects each tile's blocks.

    Unlike other backends it pads the last tile of a prompt and needs a table of [tiles, cache blocks]. Its masks are
    built in each step, so its steps cannot be captured.
    """

    name = "flex"

    def __init__(self, function: Callable[..., Any]) -> None:
        """function: `flex_attention`, compiled or not."""
        self._function = function

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        tiles, mask = self._prepared(metadata, keys, options)
        result, aux = self._function(
            query[tiles.rows].transpose(1, 2),  # [B, Hq, size, d]
            keys.flatten(0, 1).transpose(0, 1)[None],  # [1, Hkv, slots, d]
            values.flatten(0, 1).transpose(0, 1)[None],
            score_mod=None if options.softcap is None else _capped(options.softcap),
            block_mask=mask,
            scale=options.scaling,
            enable_gqa=query.shape[1] != keys.shape[2],
            return_aux=AuxRequest(lse=options.sinks is not None),
        )
        output: torch.Tensor = result.transpose(1, 2).flatten(0, 1)[tiles.places]
        if options.sinks is None:
            return output
        return with_sinks(output, aux.lse.transpose(1, 2).flatten(0, 1)[tiles.places], options.sinks)

    def _prepared(
        self, metadata: AttentionMetadata, keys: torch.Tensor, options: AttentionOptions
    ) -> tuple[Tiles, BlockMask]:
        """The tiles and the mask of layers of this kind, built by the first of them."""
        kind = (options.sliding_window, options.chunk_size)
        made: tuple[Tiles, BlockMask] | None = metadata.prepared.get(kind)
        if made is None:
            assert metadata.kernel is not None
            tiles = make_tiles(metadata.kernel.host, keys.shape[0], keys.shape[1], keys.device, options)
            made = metadata.prepared[kind] = tiles, make_mask(tiles, keys.shape[0], keys.shape[1], options)
        return made


def make_tiles(
    host: HostSequences, num_blocks: int, block_size: int, device: torch.device, options: AttentionOptions
) -> Tiles:
    """Divide the sequences' queries into tiles: of one row if all decode, otherwise of up to `TILE` rows."""
    size = min(TILE, 1 << int(host.query_lens.max() - 1).bit_length())
    counts = ceil_div(host.query_lens, size)  # tiles of each sequence
    owner = np.repeat(np.arange(len(counts)), counts)
    first = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * size  # in the sequence's queries
    inside = first[:, None] + np.arange(size)
    real = inside < host.query_lens[owner][:, None]
    starts = np.cumsum(host.query_lens) - host.query_lens
    positions = (host.context_lens - host.query_lens)[owner][:, None] + np.where(real, inside, first[:, None])
    rows = starts[owner][:, None] + np.where(real, inside, first[:, None])
    span = options.span
    seen = np.array([span.first_visible(int(position)) for position in positions[:, 0]]) // block_size
    used = positions.max(axis=1) // block_size + 1 - seen
    shifted = np.minimum(seen[:, None] + np.arange(used.max()), host.block_tables.shape[1] - 1)

    def on_device(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(array).to(device, dtype, non_blocking=True)

    blocks = on_device(host.block_tables[owner[:, None], shifted], torch.int32)
    first, count = on_device(seen, torch.int32), on_device(used, torch.int32)
    return Tiles(
        size,
        on_device(rows, torch.int64),
        on_device(np.flatnonzero(real), torch.int64),
        on_device(positions, torch.int64),
        _logical(blocks, first, count, num_blocks),
        count,
        blocks,
    )


def _logical(blocks: torch.Tensor, first: torch.Tensor, count: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The inverse of the block tables: [B, num_blocks], -1 where a tile does not use a cache block."""
    offsets = torch.arange(blocks.shape[1], device=blocks.device, dtype=torch.int32)
    used, places = offsets < count[:, None], first[:, None] + offsets
    # An extra column receives the padding of the tables and is cut off.
    table = torch.full((len(blocks), num_blocks + 1), -1, dtype=torch.int32, device=blocks.device)
    table.scatter_(1, torch.where(used, blocks, num_blocks).long(), places)
    return table[:, :num_blocks]


def make_mask(tiles: Tiles, num_blocks: int, block_size: int, options: AttentionOptions) -> BlockMask:
    """The cache slots that the rows of each tile see in layers with this window and chunk."""
    window, chunk = options.sliding_window, options.chunk_size

    def sees(tile: torch.Tensor, head: torch.Tensor, row: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        block = tiles.logical[tile, slot // block_size]
        query, key = tiles.positions[tile, row], block * block_size + slot % block_size
        seen = (block >= 0) & (key <= query)
        if window is not None:
            seen = seen & (query - key < window)
        if chunk is not None:
            seen = seen & (query // chunk == key // chunk)
        return seen

    return BlockMask.from_kv_blocks(
        tiles.num_blocks[:, None, None],
        tiles.blocks[:, None, None],
        BLOCK_SIZE=(tiles.size, block_size),
        mask_mod=sees,
        seq_lengths=(tiles.size, num_blocks * block_size),
        compute_q_blocks=False,
    )


def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    def score(score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
        return torch.tanh(score / softcap) * softcap

    return score
