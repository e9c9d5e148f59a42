"""Reusable memory for the intermediate results of CPU graphs."""

from __future__ import annotations

import weakref

import numpy as np
import torch

from ulysses_infer.arithmetic import round_up

ALIGNMENT = 64  # bytes: a cache line, a vector register
CHUNK_BYTES = 1 << 20


class Arena:
    """Gives out pieces of a few large chunks. All recordings of a rank share it, because none runs within another:
    each begins (`restart`) with all of the memory, whatever earlier ones hold, and meets its own pieces only."""

    def __init__(self) -> None:
        self._chunks: list[np.ndarray] = []
        self._pieces = _Pieces([])

    @property
    def num_bytes(self) -> int:
        """Bytes taken."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def restart(self) -> None:
        """Begin another recording: what the last one holds stays readable until this one writes over it."""
        self._pieces = _Pieces([(index, 0, chunk.nbytes) for index, chunk in enumerate(self._chunks)])

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of undefined content; its memory is free again when no view of it is left."""
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        size = round_up(count * dtype.itemsize, ALIGNMENT)
        piece = self._pieces.take(size)
        if piece is None:
            self._grow(size)
            piece = self._pieces.take(size)
            assert piece is not None
        index, start, _ = piece
        memory = self._chunks[index][start : start + count * dtype.itemsize]
        weakref.finalize(memory, self._pieces.give_back, piece)
        return torch.from_numpy(memory).view(dtype).view(shape)

    def _grow(self, size: int) -> None:
        wanted = max(CHUNK_BYTES, size) + ALIGNMENT
        raw = np.empty(wanted, dtype=np.uint8)
        first = -raw.ctypes.data % ALIGNMENT
        chunk = raw[first : first + wanted - ALIGNMENT]
        self._chunks.append(chunk)
        self._pieces.free.append((len(self._chunks) - 1, 0, chunk.nbytes))


class _Pieces:
    """The free pieces of one recording: (chunk, start, size)."""

    def __init__(self, free: list[tuple[int, int, int]]) -> None:
        self.free = free

    def take(self, size: int) -> tuple[int, int, int] | None:
        """`size` bytes of the smallest free piece that has them."""
        fitting = [piece for piece in self.free if piece[2] >= size]
        if not fitting:
            return None
        best = min(fitting, key=lambda piece: piece[2])
        self.free.remove(best)
        index, start, room = best
        if room > size:
            self.free.append((index, start + size, room - size))
        return index, start, size

    def give_back(self, piece: tuple[int, int, int]) -> None:
        """Free it, joined with its neighbours."""
        index, start, size = piece
        for other in list(self.free):
            if other[0] == index and other[1] + other[2] == start:
                self.free.remove(other)
                start, size = other[1], size + other[2]
            elif other[0] == index and start + size == other[1]:
                self.free.remove(other)
                size += other[2]
        self.free.append((index, start, size))
