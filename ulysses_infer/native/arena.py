"""Reusable memory for the intermediate results of CPU graphs."""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch

from ulysses_infer.arithmetic import round_up

ALIGNMENT = 64  # bytes: a cache line, a vector register
CHUNK_BYTES = 1 << 20


class Arena:
    """Allocates blocks from a few large chunks.

    All CPU graphs of a rank share it, because they never run at the same time: each recording starts (`restart`) with
    all of the memory, including what earlier recordings use.
    """

    def __init__(self) -> None:
        self._chunks: list[np.ndarray] = []
        self._free_list = _FreeList([])

    @property
    def num_bytes(self) -> int:
        """Bytes allocated from the system."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def restart(self) -> None:
        """Begin another recording. Results of the last one stay readable until this one overwrites them."""
        self._free_list = _FreeList([(index, 0, chunk.nbytes) for index, chunk in enumerate(self._chunks)])

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor; its memory is freed with the last view of it."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        size = round_up(count * dtype.itemsize, ALIGNMENT)
        block = self._free_list.take(size)
        if block is None:
            self._grow(size)
            block = self._free_list.take(size)
            assert block is not None
        index, start, _ = block
        memory = self._chunks[index][start : start + count * dtype.itemsize]
        weakref.finalize(memory, self._free_list.release, block)
        return torch.from_numpy(memory).view(dtype).view(shape)

    def _grow(self, size: int) -> None:
        wanted = max(CHUNK_BYTES, size) + ALIGNMENT
        raw = np.empty(wanted, dtype=np.uint8)
        first = -raw.ctypes.data % ALIGNMENT
        chunk = raw[first : first + wanted - ALIGNMENT]
        self._chunks.append(chunk)
        self._free_list.free.append((len(self._chunks) - 1, 0, chunk.nbytes))


class _FreeList:
    """Free list of one recording: (chunk, start, size)."""

    def __init__(self, free: list[tuple[int, int, int]]) -> None:
        self.free = free

    def take(self, size: int) -> tuple[int, int, int] | None:
        """Allocate `size` bytes from the smallest free block that fits; None if none does."""
        fitting = [block for block in self.free if block[2] >= size]
        if not fitting:
            return None
        best = min(fitting, key=lambda block: block[2])
        self.free.remove(best)
        index, start, room = best
        if room > size:
            self.free.append((index, start + size, room - size))
        return index, start, size

    def release(self, block: tuple[int, int, int]) -> None:
        """Free a block and merge it with adjacent free blocks."""
        index, start, size = block
        for other in list(self.free):
            if other[0] == index and other[1] + other[2] == start:
                self.free.remove(other)
                start, size = other[1], size + other[2]
            elif other[0] == index and start + size == other[1]:
                self.free.remove(other)
                size += other[2]
        self.free.append((index, start, size))
