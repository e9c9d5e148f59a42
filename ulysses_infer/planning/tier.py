"""The tier below the cache in virtual time: the engine's own index of it, with copies that only take time."""

from __future__ import annotations

from collections.abc import Sequence

from ulysses_infer.cache.offload import LOAD, SPILL, Move, OffloadTier
from ulysses_infer.cache.offload_sizing import OffloadSizes
from ulysses_infer.planning.node import HostLink
from ulysses_infer.planning.roofline import Link


class SimulatedTier:
    """Host memory and disk of one replica. Every rank copies its part of each block, all at the same time."""

    def __init__(self, sizes: OffloadSizes, link: HostLink, num_ranks: int) -> None:
        """num_ranks: of the replica; they share the disk."""
        self.index = OffloadTier(*sizes)
        self._host_slots, self._block_bytes = sizes.host_slots[0], sizes.slot_bytes[0]
        self._link, self._num_ranks = link, num_ranks
        self._free_at = 0.0

    def wait(self, moves: Sequence[Move], now: float) -> float:
        """Seconds that the step waits for which `moves` have been decided, at `now`.

        Copies run one after another. A step waits for all loads, and for stores until the rest of them is in the buffer
        on the device (`StagedCopies`).
        """
        if not moves:
            return 0.0
        self._free_at = max(self._free_at, now) + self._seconds(moves)
        hidden = 0.0
        if all(move.kind != LOAD for move in moves):
            hidden = self._link.staging_bytes / self._link.host.bytes_per_second
        return max(0.0, self._free_at - hidden - now)

    def _seconds(self, moves: Sequence[Move]) -> float:
        """A block that comes from disk is read, and copied to the device."""
        on_disk = sum(move.kind == SPILL or (move.kind == LOAD and move.source >= self._host_slots) for move in moves)
        to_host = sum(move.kind != SPILL for move in moves)
        num_bytes = self._block_bytes
        return _copy(self._link.host, to_host * num_bytes) + _copy(
            self._link.disk, on_disk * num_bytes * self._num_ranks
        )


def _copy(link: Link, num_bytes: float) -> float:
    return link.latency_seconds + num_bytes / link.bytes_per_second if num_bytes else 0.0
