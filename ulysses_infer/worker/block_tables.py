"""Block tables, mirrored on every rank as rows of one array, so that the slots of a step are one lookup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.worker.step_plan import PlanItem, StepPlan


class GroupArrays(NamedTuple):
    """What the layers of one cache group need of a step. Tables start with the first block that is still visible."""

    slots: np.ndarray  # [T] int64, cache slot of each token's key and value
    context_lens: list[int]  # tokens of each sequence in the blocks of its table, including the step's
    block_tables: np.ndarray  # [num_sequences, blocks of the longest] int64

    def narrowed(self, tokens: np.ndarray, sequences: np.ndarray) -> GroupArrays:
        """See `StepArrays.narrowed`."""
        lens = [self.context_lens[index] for index in sequences]
        return GroupArrays(self.slots[tokens], lens, self.block_tables[sequences])


class StepArrays(NamedTuple):
    """The tokens of a step, flattened in batch order."""

    positions: np.ndarray  # [T] int64, position of each token in its sequence
    query_lens: list[int]  # of each sequence; a step that runs by row has a sequence per token
    groups: list[GroupArrays]
    rows: np.ndarray  # [num_sequences] int64, row of each sequence in the block tables: its state slot

    def narrowed(self, tokens: np.ndarray) -> StepArrays:
        """The step with `tokens` alone, ascending indices: the last ones of some sequences. Others are left out."""
        owners = np.repeat(np.arange(len(self.query_lens)), self.query_lens)[tokens]
        sequences, lens = np.unique(owners, return_counts=True)
        groups = [group.narrowed(tokens, sequences) for group in self.groups]
        return StepArrays(self.positions[tokens], lens.tolist(), groups, self.rows[sequences])


class BlockTables:
    """Mirrors the block tables of all running sequences, updated by each plan.

    Blocks that rank 0 has freed because they are out of the window stay in their row and are not read. The row of a
    sequence is also its slot in the cache of recurrent states. It is the same on every rank.
    """

    def __init__(
        self,
        block_size: int,
        max_num_seqs: int,
        max_blocks_per_sequence: int,
        attention_spans: Sequence[AttentionSpan] = (AttentionSpan(),),
    ) -> None:
        """attention_spans: one per cache group."""
        self.block_size, self.attention_spans = block_size, tuple(attention_spans)
        self._blocks = [np.zeros((max_num_seqs, max_blocks_per_sequence), dtype=np.int64) for _ in self.attention_spans]
        self._lengths = np.zeros(max_num_seqs, dtype=np.int64)
        self._rows: dict[int, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._rows)

    def apply(self, plan: StepPlan) -> StepArrays:
        """Apply the plan's changes and lay out its tokens."""
        for index in plan.dropped:
            self._drop(index)
        query_lens = [item.num_tokens for item in plan.items]
        rows = np.array([self._extend(item) for item in plan.items], dtype=np.int64)
        starts = np.array([item.start for item in plan.items], dtype=np.int64)
        if plan.num_tokens == len(plan.items):  # decodes take this short cut
            positions, rows_of_tokens, ends = starts, rows, starts + 1
        else:
            lens = np.array(query_lens, dtype=np.int64)
            first = np.cumsum(lens) - lens
            positions = np.arange(plan.num_tokens, dtype=np.int64) + np.repeat(starts - first, lens)
            rows_of_tokens, ends = np.repeat(rows, lens), starts + lens
            if plan.runs_by_row:
                query_lens = [1] * plan.num_tokens
                rows, starts, ends = rows_of_tokens, positions, positions + 1
        numbers = positions // self.block_size
        offsets = positions - numbers * self.block_size
        groups = []
        for blocks, attention_span in zip(self._blocks, self.attention_spans, strict=True):
            slots = blocks[rows_of_tokens, numbers] * self.block_size + offsets
            groups.append(GroupArrays(slots, *self._visible(blocks, attention_span, rows, starts, ends)))
        return StepArrays(positions, query_lens, groups, rows)

    def _visible(
        self, blocks: np.ndarray, attention_span: AttentionSpan, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> tuple[list[int], np.ndarray]:
        """Context lengths and block tables of the sequences whose tokens `[starts, ends)` are in the step."""
        if not attention_span.is_limited:
            lens = ends.tolist()
            return lens, blocks[rows, : ceil_div(max(lens), self.block_size)]
        last = ceil_div(ends, self.block_size)
        first = attention_span.table_starts(starts, self.block_size)
        columns = first[:, None] + np.arange(int((last - first).max()))
        # Columns right of a sequence's last block are not read; any block will do.
        tables = blocks[rows[:, None], np.minimum(columns, last[:, None] - 1)]
        return (ends - first * self.block_size).tolist(), tables

    def _extend(self, item: PlanItem) -> int:
        row, new = self._rows.get(item.handle), item.new_block_ids
        if row is not None and not new:
            return row
        is_known = row is not None
        if row is None:
            row = self._rows[item.handle] = self._free.pop()
        taken, end = 0, ceil_div(item.start + item.num_tokens, self.block_size)
        for blocks, attention_span in zip(self._blocks, self.attention_spans, strict=True):
            begin = self._lengths[row] if is_known else attention_span.first_visible(item.start) // self.block_size
            blocks[row, begin:end] = new[taken : taken + end - begin]
            taken += end - begin
        self._lengths[row] = end
        return row

    def _drop(self, index: int) -> None:
        row = self._rows.pop(index, None)
        if row is not None:
            self._free.append(row)
