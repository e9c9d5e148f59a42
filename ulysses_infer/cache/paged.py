"""The KV cache tensors of one rank: blocks of keys and values of its head shard, the same in every mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.cache.groups import LayerGroups
from ulysses_infer.native.function import ELEMENTWISE, native_function

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


@dataclass(frozen=True)
class CacheShape:
    """What one rank caches a token and layer: its own KV heads; key and value widths may differ (MLA)."""

    num_layers: int
    num_key_value_heads: int
    key_width: int
    value_width: int
    block_size: int
    dtype: torch.dtype
    values_in_keys: bool = False
    """Whether values are the first numbers of keys (latents), and not stored besides."""

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block's keys and values, all layers."""
        values = self.num_key_value_heads * (self.key_width + (0 if self.values_in_keys else self.value_width))
        return self.num_layers * self.block_size * values * self.dtype.itemsize

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return ceil_div(num_tokens, self.block_size)


class CacheScales(NamedTuple):
    """What cached numbers of a layer are multiplied by to be its keys and values."""

    key: float = 1.0
    value: float = 1.0


class PagedCache:
    """keys[layer], values[layer]: [num_blocks, block_size, Hkv, width], Hkv the heads of this rank's shard.

    The layers of a cache group have as many blocks as that group.
    """

    def __init__(
        self,
        shape: CacheShape,
        num_blocks: int | Sequence[int],
        device: torch.device,
        scratch_blocks: int = 0,
        groups: LayerGroups | None = None,
    ) -> None:
        """num_blocks: of each of `groups`, None for a single one of layers that see everything.

        `scratch_blocks` more than the allocators know of, for rows that only pad a step.
        """
        self.shape, self.device = shape, device
        self.groups = groups or LayerGroups.single(shape.num_layers)
        self.blocks_of_groups = (num_blocks,) if isinstance(num_blocks, int) else tuple(num_blocks)
        self._scratch_blocks = scratch_blocks
        on_cpu = device.type == "cpu"
        self._store = native_function("attention", "store_rows", "pppiii", ELEMENTWISE) if on_cpu else None
        self.take()

    def take(self) -> None:
        """Take the memory; what the blocks hold is undefined."""
        self.keys = [self._allocate(layer, self.shape.key_width) for layer in range(self.shape.num_layers)]
        if self.shape.values_in_keys:
            self.values = [keys[..., : self.shape.value_width] for keys in self.keys]
        else:
            self.values = [self._allocate(layer, self.shape.value_width) for layer in range(self.shape.num_layers)]

    def release(self) -> None:
        """Give the memory back, until `take`."""
        self.keys, self.values = [], []

    def _allocate(self, layer: int, width: int) -> torch.Tensor:
        shape, num_blocks = self.shape, self.blocks_of_groups[self.groups.of_layer[layer]]
        # Not touched until written: on a CPU the pages are only taken as blocks are first used.
        return torch.empty(
            num_blocks + self._scratch_blocks,
            shape.block_size,
            shape.num_key_value_heads,
            width,
            dtype=shape.dtype,
            device=self.device,
        )

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the step's keys and values. slots: [T]; key: [T, Hkv, d]; value: [T, Hkv, dv]."""
        pairs = ((self.keys[layer], key), (self.values[layer], value))
        for cached, new in pairs[:1] if self.shape.values_in_keys else pairs:
            if self._store is not None and new.dtype == cached.dtype and _is_dense(new):
                size = cached.dtype.itemsize
                self._store(
                    cached.data_ptr(),
                    slots.data_ptr(),
                    new.data_ptr(),
                    len(slots),
                    new[0].numel() * size,
                    new.stride(0) * size,
                )
                continue
            if cached.dtype == FP8:  # what it cannot hold becomes the largest that it can; torch copies it as bytes
                new, cached = new.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8), cached.view(torch.uint8)
            cached.flatten(0, 1).index_copy_(0, slots, new.to(cached.dtype))

    @property
    def num_blocks(self) -> int:
        """Blocks of the first group: what limits how long texts can be."""
        return self.blocks_of_groups[0]

    def scratch_block(self, group: int) -> int:
        """The first scratch block of a group."""
        assert self._scratch_blocks > 0
        return self.blocks_of_groups[group]

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [n, Hkv, d] and values [n, Hkv, dv] at `slots`; for tests and tools."""
        return self.keys[layer].flatten(0, 1)[slots], self.values[layer].flatten(0, 1)[slots]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole cache."""
        counts = [self.blocks_of_groups[group] for group in self.groups.of_layer]
        return sum(counts) * self.shape.bytes_per_block // self.shape.num_layers


def _is_dense(rows: torch.Tensor) -> bool:
    """[T, H, d]: whether what a token has lies together."""
    return len(rows) > 0 and rows.stride(2) == 1 and (rows.stride(1) == rows.shape[2] or rows.shape[1] == 1)
