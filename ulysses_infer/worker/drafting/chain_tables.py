"""Block tables of drafted tokens: those of the text, continued in blocks that no request owns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.worker.block_tables import GroupArrays, StepArrays


def scratch_blocks_per_sequence(block_size: int, max_drafted: int) -> int:
    """Blocks that a sequence's drafted tokens may touch: the one that its text has begun, and those behind it."""
    return 1 + ceil_div(max_drafted, block_size)


class ChainTables(NamedTuple):
    """Where the keys and values of drafted tokens go, for n sequences.

    A block that the text has begun is continued in a copy, so that drafting never writes to what requests share.
    """

    first: np.ndarray  # [n] int64, position of the first drafted token that the head reads
    tables: np.ndarray  # [n, blocks] int64
    copied: np.ndarray  # [m, 2] int64, (block of the text, its copy)
    block_size: int

    @classmethod
    def of(
        cls, step: GroupArrays, sequences: np.ndarray, positions: np.ndarray, first_scratch: int, each: int, size: int
    ) -> ChainTables:
        """step: of the step before; sequences: rows of its block tables; positions: [n], of the texts' last tokens;
        first_scratch: the first block that no request owns; each: such blocks per sequence; size: tokens of a block.
        """
        first = positions + 1
        kept = first // size
        own = first_scratch + each * np.arange(len(first), dtype=np.int64)[:, None] + np.arange(each)
        tables = np.zeros((len(first), int(kept.max(initial=0)) + each), dtype=np.int64)
        for row, (sequence, count) in enumerate(zip(sequences, kept, strict=True)):
            tables[row, :count] = step.block_tables[sequence, :count]
            tables[row, count : count + each] = own[row]
        begun = np.flatnonzero(first % size)
        copied = np.stack([step.block_tables[sequences[begun], kept[begun]], own[begun, 0]], axis=-1)
        return cls(first, tables, copied, size)

    def arrays(self, place: int) -> StepArrays:
        """The arrays of a step with the token `place` of each sequence, 0 being the first drafted one."""
        positions = self.first + place
        blocks = self.tables[np.arange(len(positions)), positions // self.block_size]
        slots = blocks * self.block_size + positions % self.block_size
        group = GroupArrays(slots, (positions + 1).tolist(), self.tables)
        return StepArrays(positions, [1] * len(positions), [group], np.zeros(len(positions), dtype=np.int64))
