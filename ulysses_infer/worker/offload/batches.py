"""Moves in batches: copies of one pool that may run together, without a change of what any of them reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ulysses_infer.cache.offload import SPILL, STORE, Move


class MoveBatch:
    """Moves of one pool that give the same result in the order spills, stores, loads as in their own order."""

    def __init__(self, pool: int, host_slots: int) -> None:
        self.pool, self._host_slots = pool, host_slots
        self.spills: dict[int, int] = {}
        """Slot on disk: slot in host memory that is copied there."""
        self.stores: dict[int, int] = {}
        """Slot in host memory: block."""
        self.loads: dict[int, int] = {}
        """Block: slot, those on disk counted after those in host memory."""
        self._loaded: set[int] = set()

    def add(self, move: Move) -> bool:
        """Add a move if it may run together with those before; returns whether it may."""
        source, target = move.source, move.target
        if move.kind == SPILL:
            fits = source not in self.stores and target not in self.spills
            fits = fits and self._host_slots + target not in self._loaded
            batch = self.spills
        elif move.kind == STORE:
            fits = target not in self.stores and target not in self._loaded and source not in self.loads
            batch = self.stores
        else:
            fits = target not in self.loads
            batch = self.loads
            if fits:
                self._loaded.add(source)
        if fits:
            batch[target] = source
        return fits


def batches(moves: Iterable[Move], host_slots: Iterable[int]) -> Iterator[MoveBatch]:
    """Batches that together do what `moves` do one after another. host_slots: of each pool. Pools are independent."""
    slots = list(host_slots)
    opened: dict[int, MoveBatch] = {}
    for move in moves:
        batch = opened.setdefault(move.pool, MoveBatch(move.pool, slots[move.pool]))
        if not batch.add(move):
            yield batch
            batch = opened[move.pool] = MoveBatch(move.pool, slots[move.pool])
            batch.add(move)
    yield from opened.values()
