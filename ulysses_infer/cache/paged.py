"""The KV cache of one rank: blocks of keys and values of its own head shard, the same in every mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ulysses_infer.errors import ConfigError

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

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block's keys and values, all layers."""
        values = self.num_key_value_heads * (self.key_width + self.value_width)
        return self.num_layers * self.block_size * values * self.dtype.itemsize

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)


class PagedCache:
    """keys[layer], values[layer]: [num_blocks, block_size, Hkv, width], Hkv the heads of this rank's shard."""

    def __init__(self, shape: CacheShape, num_blocks: int, device: torch.device, scratch_blocks: int = 0) -> None:
        """`scratch_blocks` more than the allocator knows of, for rows that only pad a step."""
        self.shape, self.num_blocks, self.device = shape, num_blocks, device
        self._scratch_blocks = scratch_blocks
        self.take()

    def take(self) -> None:
        """Take the memory; what the blocks hold is undefined."""
        self.keys = [self._allocate(self.shape.key_width) for _ in range(self.shape.num_layers)]
        self.values = [self._allocate(self.shape.value_width) for _ in range(self.shape.num_layers)]

    def release(self) -> None:
        """Give the memory back, until `take`."""
        self.keys, self.values = [], []

    def _allocate(self, width: int) -> torch.Tensor:
        shape = self.shape
        # Not touched until written: on a CPU the pages are only taken as blocks are first used.
        return torch.empty(
            self.num_blocks + self._scratch_blocks, shape.block_size, shape.num_key_value_heads, width,
            dtype=shape.dtype, device=self.device,
        )

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the step's keys and values. slots: [T]; key: [T, Hkv, d]; value: [T, Hkv, dv]."""
        for cached, new in ((self.keys[layer], key), (self.values[layer], value)):
            if cached.dtype == FP8:  # what it cannot hold becomes the largest that it can; torch copies it as bytes
                new, cached = new.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8), cached.view(torch.uint8)
            cached.flatten(0, 1).index_copy_(0, slots, new.to(cached.dtype))

    @property
    def scratch_block(self) -> int:
        """The first scratch block."""
        assert self._scratch_blocks > 0
        return self.num_blocks

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [n, Hkv, d] and values [n, Hkv, dv] at `slots`; for tests and tools."""
        return self.keys[layer].flatten(0, 1)[slots], self.values[layer].flatten(0, 1)[slots]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.num_blocks * self.shape.bytes_per_block


def check_fits_one_request(num_blocks: int, shape: CacheShape, max_model_len: int) -> None:
    """Raise `ConfigError` when the cache cannot hold a single request of `max_model_len` tokens."""
    needed = shape.blocks_for(max_model_len)
    if num_blocks < needed:
        raise ConfigError(
            f"the cache holds {num_blocks} blocks = {num_blocks * shape.block_size} tokens, less than one request of "
            f"max_model_len {max_model_len}; raise cache.memory_bytes to at least {needed * shape.bytes_per_block} "
            f"or lower model.max_model_len to {num_blocks * shape.block_size}"
        )
