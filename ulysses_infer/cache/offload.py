"""Which evicted blocks a tier of host memory and disk keeps, and what every rank copies for it.

Decided on rank 0 with the block allocators. Slot numbers are the same on every rank, like block numbers; a rank copies
its own part of a block (`worker/offload/`). A block is copied when it is evicted, not when it is computed, so that
blocks that stay cached cost nothing.

Source of the idea: tiers of one prefix cache, as in SGLang's hierarchical cache and vLLM's KV offloading connector.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ulysses_infer.cache.blocks import PrefixCacheStats
from ulysses_infer.cache.free_list import FreeList

STORE, SPILL, LOAD = 0, 1, 2
"""Kinds of moves: from a block to host memory, from there to disk, from either to a block."""


class Move(NamedTuple):
    """One copy. Moves are applied in the order in which they were decided."""

    kind: int
    pool: int
    """Cache group; one more than the last for snapshots of recurrent states."""
    source: int
    """The block (`STORE`) or the slot. Slots on disk are counted after those in host memory."""
    target: int


class OffloadPool:
    """The slots of one block allocator, or of the snapshots of recurrent states.

    Blocks are known by their content's hash. The least recently used one in host memory moves to disk when its slot is
    needed, the least recently used one on disk is forgotten. A block that is loaded keeps its slot, so that it need not
    be copied when it is evicted again. One that is loaded from disk moves to host memory when it is evicted.
    """

    def __init__(self, number: int, host_slots: int, disk_slots: int, moves: list[Move]) -> None:
        """number: `Move.pool`; moves: where decisions are appended. At least one slot in host memory."""
        self.number, self.host_slots, self.disk_slots = number, host_slots, disk_slots
        self.num_stored = self.num_spilled = self.num_loaded = 0
        self._moves = moves
        self._in_use: frozenset[bytes] = frozenset()
        self.reset()

    def __contains__(self, content: bytes) -> bool:
        """Whether the tier has the block with hash `content`."""
        return content in self._host or content in self._disk

    @property
    def num_in_host(self) -> int:
        """Blocks in host memory."""
        return len(self._host)

    @property
    def num_on_disk(self) -> int:
        """Blocks on disk."""
        return len(self._disk)

    def store(self, content: bytes, block: int) -> None:
        """Keep the content of `block`, which is about to be reused.

        Nothing happens if host memory has it, or if every slot holds what `hold` protects.
        """
        if content in self._host:
            self._host.move_to_end(content)
            return
        on_disk = self._disk.pop(content, None)
        if on_disk is not None:
            self._free_on_disk.give(on_disk)
        slot = self._host_slot()
        if slot is None:
            return
        self._host[content] = slot
        self.num_stored += 1
        self._moves.append(Move(STORE, self.number, block, slot))

    def hold(self, contents: Iterable[bytes]) -> None:
        """Protect `contents`, which the tier has, until `release`: they will be loaded."""
        self._in_use = frozenset(contents)
        for content in self._in_use:
            (self._host if content in self._host else self._disk).move_to_end(content)

    def release(self) -> None:
        """End the protection by `hold`."""
        self._in_use = frozenset()

    def load(self, content: bytes, block: int) -> None:
        """Copy `content`, which the tier has, to `block` before the next step."""
        slot = self._host.get(content)
        source = self.host_slots + self._disk[content] if slot is None else slot
        self.num_loaded += 1
        self._moves.append(Move(LOAD, self.number, source, block))

    def reset(self) -> None:
        """Forget everything."""
        self._host: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._disk: OrderedDict[bytes, int] = OrderedDict()
        self._free_in_host, self._free_on_disk = FreeList(self.host_slots), FreeList(self.disk_slots)

    def _host_slot(self) -> int | None:
        """A slot in host memory to write; its content moves to disk, if there is any. None: all are protected."""
        if free := self._free_in_host.take(1):
            return free[0]
        oldest = next(iter(self._host))
        if oldest in self._in_use:  # only what was stored since `hold` is younger
            return None
        slot = self._host.pop(oldest)
        self._spill(oldest, slot)
        return slot

    def _spill(self, content: bytes, slot: int) -> None:
        """Move `content` from host memory to disk, if there is a slot that is not protected."""
        if free := self._free_on_disk.take(1):
            target = free[0]
        elif self._disk and next(iter(self._disk)) not in self._in_use:
            _, target = self._disk.popitem(last=False)
        else:
            return
        self._disk[content] = target
        self.num_spilled += 1
        self._moves.append(Move(SPILL, self.number, slot, target))


class OffloadTier:
    """The tier of one replica: a pool for each cache group and, last, for snapshots of recurrent states if any."""

    def __init__(self, host_slots: Sequence[int], disk_slots: Sequence[int], slot_bytes: Sequence[int]) -> None:
        """One number per pool; slot_bytes: of a slot on each rank."""
        self._moves: list[Move] = []
        self.slot_bytes = tuple(slot_bytes)
        self.pools = [
            OffloadPool(number, *slots, self._moves)
            for number, slots in enumerate(zip(host_slots, disk_slots, strict=True))
        ]
        self.stats = PrefixCacheStats()
        """Tokens looked up here because the cache itself did not have them, and found."""

    def take_moves(self) -> tuple[Move, ...]:
        """What has been decided since the last call; every rank does it before the next step."""
        if not self._moves:
            return ()
        moves = tuple(self._moves)
        self._moves.clear()
        return moves

    def reset(self) -> None:
        """Forget everything, for example after a weight update. No request waits for a load."""
        self._moves.clear()
        for pool in self.pools:
            pool.reset()

    @property
    def stored_bytes(self) -> int:
        """Bytes copied to host memory on each rank since the start."""
        return self._bytes([pool.num_stored for pool in self.pools])

    @property
    def loaded_bytes(self) -> int:
        """Bytes copied back on each rank since the start."""
        return self._bytes([pool.num_loaded for pool in self.pools])

    @property
    def spilled_bytes(self) -> int:
        """Bytes copied from host memory to disk on each rank since the start."""
        return self._bytes([pool.num_spilled for pool in self.pools])

    @property
    def host_usage(self) -> float:
        """Used share of the fullest pool's host memory, 0 to 1."""
        return max(pool.num_in_host / pool.host_slots for pool in self.pools)

    @property
    def disk_usage(self) -> float:
        """Used share of the fullest pool's disk space, 0 to 1; 0 without any."""
        return max(pool.num_on_disk / max(1, pool.disk_slots) for pool in self.pools)

    def _bytes(self, counts: Sequence[int]) -> int:
        return sum(count * size for count, size in zip(counts, self.slot_bytes, strict=True))
