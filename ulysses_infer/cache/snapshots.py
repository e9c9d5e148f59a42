"""The pool of state snapshots: which prefix each one continues, and which is given up when space is needed."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

from ulysses_infer.cache.blocks import LowerTier


class SnapshotPool:
    """Slots for snapshots of recurrent states, least recently used first. Slot numbers are the same on every rank.

    A slot is empty, reserved (a step that is scheduled will write it) or published: its content is the state after the
    prefix whose last block has a certain hash. Published slots are reused when no slot is empty.
    """

    def __init__(self, num_slots: int, first_slot: int = 0, tier: LowerTier | None = None) -> None:
        """tier: keeps snapshots that are given up; None: they are lost."""
        self.num_slots, self._tier = num_slots, tier
        self.num_hits = 0
        """Requests that started from a snapshot, since the start."""
        self._empty = list(range(first_slot + num_slots - 1, first_slot - 1, -1))
        self._reserved: set[int] = set()
        self._read: set[int] = set()  # by the next step; loads come before it, so nothing is loaded into these
        self._published: OrderedDict[bytes, int] = OrderedDict()  # least recently used first

    def __contains__(self, content: bytes) -> bool:
        """Whether there is a snapshot of the prefix with hash `content`."""
        return content in self._published

    @property
    def num_held(self) -> int:
        """Published snapshots."""
        return len(self._published)

    @property
    def num_reserved(self) -> int:
        """Slots that scheduled steps will write."""
        return len(self._reserved)

    def longest(self, block_hashes: Sequence[bytes], at_most: int) -> int:
        """The most blocks, up to `at_most`, after which there is a snapshot; 0 if there is none."""
        tier = None if self._slot_to_load() is None else self._tier
        return next(
            (
                n
                for n in range(at_most, 0, -1)
                if block_hashes[n - 1] in self._published or (tier is not None and block_hashes[n - 1] in tier)
            ),
            0,
        )

    def use(self, content: bytes) -> int:
        """The slot of the snapshot `content`, for a request that starts from it; loaded if only the tier has it."""
        self.num_hits += 1
        if content not in self._published:
            self._load(content)
        self.touch(content)
        self.keep_for_step(self._published[content])
        return self._published[content]

    def keep_for_step(self, slot: int) -> None:
        """Load nothing into `slot` before the next step, which reads it."""
        self._read.add(slot)

    def end_plan(self) -> None:
        """The plan of the next step is made: later loads come after it."""
        self._read.clear()

    def _load(self, content: bytes) -> None:
        """Publish a snapshot of the tier."""
        assert self._tier is not None
        self._tier.hold((content,))
        slot = self._slot_to_load()
        assert slot is not None, "`longest` looks in the tier only if a slot can be had"
        self._take(slot)
        self._tier.load(content, slot)
        self._tier.release()
        self.publish(slot, content)

    def touch(self, content: bytes) -> None:
        """Count the published snapshot `content` as used now."""
        self._published.move_to_end(content)

    def reserve(self) -> int | None:
        """A slot to write, in place of the least recently used snapshot if none is empty; None if all are reserved."""
        slot = self._empty[-1] if self._empty else next(iter(self._published.values()), None)
        if slot is not None:
            self._take(slot)
        return slot

    def _slot_to_load(self) -> int | None:
        """As the one that `reserve` takes, of those that the next step does not read."""
        slots = itertools.chain(reversed(self._empty), self._published.values())
        return next((slot for slot in slots if slot not in self._read), None)

    def _take(self, slot: int) -> None:
        """Reserve an empty or published slot; the tier keeps what was in it."""
        if slot in self._empty:
            self._empty.remove(slot)
        else:
            content = next(content for content, own in self._published.items() if own == slot)
            del self._published[content]
            if self._tier is not None:
                self._tier.store(content, slot)
        self._reserved.add(slot)

    def publish(self, slot: int, content: bytes) -> None:
        """Offer the reserved `slot`, now written, to requests with the prefix `content`."""
        if content in self._published:
            self.release(slot)
            self.touch(content)
            return
        self._reserved.remove(slot)
        self._published[content] = slot

    def release(self, slot: int) -> None:
        """Give back a reserved slot that no one will read."""
        self._reserved.remove(slot)
        self._empty.append(slot)

    def reset(self) -> None:
        """Forget all published snapshots, for example after a weight update."""
        self._empty.extend(self._published.values())
        self._published.clear()

    def assert_idle(self) -> None:
        """Raise AssertionError unless every slot is empty or published."""
        if self._reserved or len(self._empty) + len(self._published) != self.num_slots:
            raise AssertionError(f"idle engine, but the snapshot slots {sorted(self._reserved)} are reserved")
