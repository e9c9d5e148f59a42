"""Blocks as rows of bytes: what one slot of the tier below the cache holds of each block."""

from __future__ import annotations

from collections.abc import Sequence

import torch

WORD = torch.int64


class BlockRows:
    """A pool's blocks on this rank: all layers of a cache group, or the states of recurrent layers.

    A row has the block's part of each tensor, one after another. Copies move words of 8 bytes where all parts consist
    of them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """tensors: [blocks, ...] each, of any dtype, contiguous per block."""
        parts = [tensor.view(len(tensor), -1).view(torch.uint8) for tensor in tensors if tensor.numel()]
        has_words = all(_has_words(part) for part in parts)
        self._dtype = WORD if has_words else torch.uint8
        self.parts = [part.view(self._dtype) for part in parts]
        self._ends = [0]
        for part in self.parts:
            self._ends.append(self._ends[-1] + part.shape[1])

    @property
    def num_bytes(self) -> int:
        """Bytes of a row."""
        return self._ends[-1] * self._dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the row of a block is contiguous in the cache."""
        return len(self.parts) == 1

    def copy_out(self, blocks: torch.Tensor, memory: torch.Tensor, rows: torch.Tensor) -> None:
        """memory[rows] = blocks. blocks, rows: [n] int64, rows distinct; memory: [m, num_bytes] uint8, same device."""
        for part, own in zip(self.parts, self._split(memory), strict=True):
            own.index_copy_(0, rows, part.index_select(0, blocks))

    def copy_in(self, memory: torch.Tensor, rows: torch.Tensor, blocks: torch.Tensor) -> None:
        """blocks = memory[rows]; the arguments of `copy_out`, blocks distinct."""
        for part, own in zip(self.parts, self._split(memory), strict=True):
            part.index_copy_(0, blocks, own.index_select(0, rows))

    def _split(self, memory: torch.Tensor) -> list[torch.Tensor]:
        words = memory.view(self._dtype) if self.parts else memory
        return [words[:, start:stop] for start, stop in zip(self._ends, self._ends[1:], strict=False)]


def _has_words(part: torch.Tensor) -> bool:
    size = WORD.itemsize
    return part.shape[1] % size == 0 and part.storage_offset() % size == 0 and part.stride(0) % size == 0
