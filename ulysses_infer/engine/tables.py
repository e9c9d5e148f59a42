"""Block tables as every rank mirrors them: rows of one array, so that a step's slots are one lookup."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ulysses_infer.engine.plan import StepPlan


class StepArrays(NamedTuple):
    """A step's tokens laid out flat, in batch order."""

    positions: np.ndarray  # [T] int64, position of each token in its sequence
    slots: np.ndarray  # [T] int64, where its key and value go in the cache
    query_lens: list[int]
    context_lens: list[int]
    block_tables: np.ndarray  # [num_sequences, blocks of the longest] int64


class BlockTables:
    """Follows the block table of every running sequence from the plans' increments."""

    def __init__(self, block_size: int, max_num_seqs: int, max_blocks_per_sequence: int) -> None:
        self.block_size = block_size
        self._blocks = np.zeros((max_num_seqs, max_blocks_per_sequence), dtype=np.int64)
        self._lengths = np.zeros(max_num_seqs, dtype=np.int64)
        self._rows: dict[int, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._rows)

    def apply(self, plan: StepPlan) -> StepArrays:
        """Take in the plan's changes and lay out its tokens."""
        for index in plan.dropped:
            self._drop(index)
        rows = np.array([self._extend(item.handle, item.new_block_ids) for item in plan.items], dtype=np.int64)
        lens = np.array([item.num_tokens for item in plan.items], dtype=np.int64)
        starts = np.array([item.start for item in plan.items], dtype=np.int64)
        first = np.cumsum(lens) - lens
        positions = np.arange(plan.num_tokens, dtype=np.int64) + np.repeat(starts - first, lens)
        blocks = self._blocks[np.repeat(rows, lens), positions // self.block_size]
        slots = blocks * self.block_size + positions % self.block_size
        widest = int(-(-(starts + lens).max() // self.block_size))
        tables = self._blocks[rows, :widest]
        return StepArrays(positions, slots, lens.tolist(), (starts + lens).tolist(), tables)

    def _extend(self, index: int, new_block_ids: list[int]) -> int:
        row = self._rows.get(index)
        if row is None:
            row = self._rows[index] = self._free.pop()
            self._lengths[row] = 0
        if new_block_ids:
            length = self._lengths[row]
            self._blocks[row, length : length + len(new_block_ids)] = new_block_ids
            self._lengths[row] = length + len(new_block_ids)
        return row

    def _drop(self, index: int) -> None:
        row = self._rows.pop(index, None)
        if row is not None:
            self._free.append(row)
