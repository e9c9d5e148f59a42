"""Applies the moves of step plans on one rank, each to its own part of the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ulysses_infer.cache.offload import Move
from ulysses_infer.cache.offload_memory import OffloadMemory
from ulysses_infer.cache.offload_sizing import OffloadSizes
from ulysses_infer.worker.offload.batches import MoveBatch, batches
from ulysses_infer.worker.offload.block_rows import BlockRows
from ulysses_infer.worker.offload.copies import Copies

TensorsOfPools = Callable[[], Sequence[Sequence[torch.Tensor]]]
"""The tensors of each pool, [blocks, ...], wherever the cache's memory is now."""


class BlockMover:
    """Copies blocks between the cache and the tier below it."""

    def __init__(
        self,
        tensors: TensorsOfPools,
        memory: OffloadMemory,
        make_copies: Callable[[Sequence[BlockRows]], Copies],
    ) -> None:
        """Call `take` before use."""
        self.memory = memory
        self._tensors, self._make_copies = tensors, make_copies
        self._rows: list[BlockRows] = []
        self._copies: Copies | None = None

    @property
    def sizes(self) -> OffloadSizes:
        """The slots of the tier."""
        return self.memory.sizes

    def take(self) -> None:
        """Allocate the memory, when the cache has its own."""
        self.memory.take()
        self._rows = [BlockRows(tensors) for tensors in self._tensors()]
        self._copies = self._make_copies(self._rows)

    def release(self) -> None:
        """Free the memory, until `take`. All that it holds is lost."""
        if self._copies is not None:
            self._copies.wait()
        self._rows, self._copies = [], None
        self.memory.release()

    def apply(self, moves: Sequence[Move]) -> None:
        """Do what a step plan says before its step."""
        assert self._copies is not None, "the memory is released"
        with self._copies.before_step():
            for batch in batches(moves, self.sizes.host_slots):
                self._apply(batch, self._copies)

    def _apply(self, batch: MoveBatch, copies: Copies) -> None:
        rows, host, host_slots = self._rows[batch.pool], self.memory.host[batch.pool], len(self.memory.host[batch.pool])
        if batch.spills:
            copies.wait()
            sources, targets = torch.tensor([*batch.spills.values()]), torch.tensor([*batch.spills])
            self.memory.disk[batch.pool].index_copy_(0, targets, host.index_select(0, sources))
        if batch.stores:
            copies.store(rows, [*batch.stores.values()], host, [*batch.stores])
        in_host = {block: slot for block, slot in batch.loads.items() if slot < host_slots}
        on_disk = {block: slot - host_slots for block, slot in batch.loads.items() if slot >= host_slots}
        if in_host:
            copies.load(rows, host, [*in_host.values()], [*in_host])
        if on_disk:
            copies.load(rows, self.memory.disk[batch.pool], [*on_disk.values()], [*on_disk])
