"""Snapshots of recurrent states: where prompts stop for one, and which step of a request takes it."""

from __future__ import annotations

from ulysses_infer.cache.pools import BlockPools
from ulysses_infer.engine.request import Request


class SnapshotPoints:
    """Decides after which tokens the states of a request are saved. Does nothing if the model has no states.

    Only the state at the end of a step can be saved, and only full blocks have a hash. So chunks of a prompt end at
    multiples of an interval, and where the prompt leaves another text whose blocks are cached (Pan et al., "Marconi:
    Prefix Caching for the Era of Hybrid LLMs", MLSys 2025). Decodes pass every multiple.
    """

    def __init__(self, allocator: BlockPools, interval: int) -> None:
        """interval: in tokens, a multiple of the block size."""
        self._slots = allocator.snapshots
        self.has_states = allocator.snapshots is not None
        """Whether requests have states at all."""
        self._pool = allocator.snapshots if allocator.enable_prefix_caching else None
        self._interval, self._block_size = interval, allocator.block_size
        self._allocator = allocator

    def look_up(self, request: Request, block_hashes: list[bytes]) -> None:
        """Note how much of the text `block_hashes` is cached without regard to snapshots."""
        if self._pool is not None:
            request.shared_prefix = self._allocator.match_blocks(block_hashes)[0] * self._block_size

    def chunk(self, request: Request, start: int, count: int, left: int) -> int:
        """How many of `count` tokens from position `start` a step takes, of `left` uncomputed ones, at least 1.

        A request never starts after its last known token, whose output it needs. So a prompt stops before that one.
        """
        if left == 1 or self._pool is None or not self._pool.num_slots:
            return count
        end = start + count - (count == left)
        aligned = end // self._interval * self._interval
        if start < request.shared_prefix <= end:
            aligned = request.shared_prefix
        return aligned - start if aligned > start else count

    def restored(self, request: Request, start: int) -> int | None:
        """The slot of the snapshot that `request` starts from, after `start` tokens found in the prefix cache."""
        if self._pool is None or start == 0:
            return None
        return self._pool.use(request.block_hashes[start // self._block_size - 1])

    def reserve(self, request: Request, end: int) -> int | None:
        """The slot for a snapshot of `request` after its first `end` tokens; None if none is taken."""
        if self._pool is None:
            return None
        number, rest = divmod(end, self._block_size)
        if rest or (end % self._interval and end != request.shared_prefix):
            return None
        if end <= request.num_tokens:  # else the last token is not known yet
            content = request.hashes_of_blocks(number, self._block_size)[number - 1]
            if content in self._pool:
                self._pool.touch(content)
                return None
        slot = self._pool.reserve()
        if slot is not None:
            request.reserved_snapshots.append((end, slot))
        return slot

    def checkpoint(self, request: Request) -> bool:
        """Whether `request` can go back to its present states after drafted tokens are rejected, of which a slot is
        reserved: always without states."""
        if self._slots is None:
            return True
        request.checkpoint = self._slots.reserve()
        return request.checkpoint is not None

    def drop_checkpoint(self, request: Request) -> int | None:
        """Give back the slot of the checkpoint, if there is one, which is restored before another step writes it."""
        slot, request.checkpoint = request.checkpoint, None
        if slot is not None:
            assert self._slots is not None
            self._slots.release(slot)
            self._slots.keep_for_step(slot)
        return slot

    def publish(self, request: Request, end: int) -> None:
        """Publish the snapshot after `end` tokens, which are known, if it is the next of those reserved."""
        reserved = request.reserved_snapshots
        if self._pool is not None and reserved[0][0] == end:
            number = end // self._block_size
            content = request.hashes_of_blocks(number, self._block_size)[number - 1]
            self._pool.publish(reserved.pop(0)[1], content)

    def release(self, request: Request) -> None:
        """Give back what `request` has reserved."""
        self.drop_checkpoint(request)
        if self._pool is not None:
            for _, slot in request.reserved_snapshots:
                self._pool.release(slot)
        request.reserved_snapshots.clear()
