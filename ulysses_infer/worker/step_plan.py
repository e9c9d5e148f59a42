"""The step plan: what rank 0 sends to every rank for one step. Small, typed, and identical on all ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgpack
import numpy as np

from ulysses_infer.cache.offload import Move
from ulysses_infer.parallel.layout import Mode

NO_LOGITS, LAST_LOGITS, ALL_LOGITS, DRAFT_LOGITS = 0, 1, 2, 3


class PlanItem(NamedTuple):
    """One sequence's part of a step: `num_tokens` tokens from position `start`."""

    handle: int
    """The request's `index`."""
    start: int
    num_tokens: int
    new_block_ids: list[int]
    """Blocks appended to its tables, one cache group after another; `start` and `num_tokens` imply the counts."""
    logits: int
    """Which rows need logits: none, the last one, all (prompt log-probabilities), or all because they are a decode and
    the drafted tokens after it."""
    adapter: int = 0
    """Number of the LoRA adapter applied to its tokens; 0: none."""

    @property
    def num_logits(self) -> int:
        """Tokens whose logits are needed, the last ones."""
        return {NO_LOGITS: 0, LAST_LOGITS: 1}.get(self.logits, self.num_tokens)

    def narrowed(self) -> PlanItem:
        """The part with those tokens alone; its blocks are in the tables already."""
        return self._replace(
            start=self.start + self.num_tokens - self.num_logits, num_tokens=self.num_logits, new_block_ids=[]
        )


class StepPlan(NamedTuple):
    """Everything a rank needs for one step besides the block tables, which it mirrors."""

    sequence: int
    mode: Mode
    items: list[PlanItem]
    token_ids: np.ndarray
    """[T] int32, the step's tokens in item order; negative ones are placeholders (see `placeholder`)."""
    dropped: list[int]
    """Sequences whose block tables are dropped before the step: finished, aborted or preempted."""
    full_logits: bool
    """Whether rank 0 needs whole logits rows; otherwise each rank's best token is enough."""
    keeps_tokens: bool = False
    """Whether every rank keeps the chosen tokens, because the next step may start before rank 0 has received them."""
    restores: Sequence[tuple[int, int]] = ()
    """(handle, snapshot slot) of each sequence whose recurrent states are restored before the step."""
    snapshots: Sequence[tuple[int, int]] = ()
    """(handle, snapshot slot) of each sequence whose states are saved after the step. Restores come first."""
    checkpoints: Sequence[tuple[int, int]] = ()
    """(handle, snapshot slot) of each sequence whose states are saved before the step, but after restores, because it
    has drafted tokens that may be rejected."""
    pools: bool = False
    """Whether rank 0 needs what the vocabulary head reads, for the vectors of prompts."""
    moves: Sequence[Move] = ()
    """Copies between the cache and the tier below it, in this order and before anything else of the step."""

    @property
    def num_tokens(self) -> int:
        """Batched tokens T of the step."""
        return len(self.token_ids)

    @property
    def has_placeholders(self) -> bool:
        """Whether some of its tokens are placeholders."""
        return bool((self.token_ids < 0).any())

    @property
    def runs_by_row(self) -> bool:
        """Whether the step has only decodes, with or without drafted tokens. Each of its tokens is then laid out as a
        sequence of one token, so that verified steps are decode steps of more rows."""
        if self.num_tokens == len(self.items):
            return True
        return all(item.logits == DRAFT_LOGITS or item.num_tokens == 1 for item in self.items)

    @property
    def num_sequences(self) -> int:
        """Sequences that attention sees: one per item, or per token in a step that runs by row."""
        return self.num_tokens if self.runs_by_row else len(self.items)

    def narrowed(self) -> StepPlan:
        """The step with the tokens whose logits are needed alone, which are the last ones of their sequences."""
        items = [item.narrowed() for item in self.items if item.logits != NO_LOGITS]
        return self._replace(items=items, token_ids=self.token_ids[logits_positions(self.items)])

    @property
    def digest(self) -> int:
        """A checksum of what all ranks must agree on; compared on every rank in debug mode."""
        return zlib.crc32(self.encode())

    def encode(self) -> bytes:
        """The plan as bytes."""
        fields = (
            self.sequence,
            self.mode,
            self.items,
            self.token_ids.tobytes(),
            self.dropped,
            self.full_logits,
            self.keeps_tokens,
            self.restores,
            self.snapshots,
            self.checkpoints,
            self.pools,
            self.moves,
        )
        encoded: bytes = msgpack.packb(fields)
        return encoded

    @classmethod
    def decode(cls, data: bytes) -> StepPlan:
        """The inverse of `encode`."""
        sequence, mode, items, tokens, dropped, full_logits, keeps_tokens, *states, pools, moves = msgpack.unpackb(data)
        token_ids = np.frombuffer(tokens, dtype=np.int32)
        items = [PlanItem(*item) for item in items]
        restores, snapshots, checkpoints = (tuple((handle, slot) for handle, slot in each) for each in states)
        flags, rest = (full_logits, keeps_tokens), (pools, tuple(Move(*move) for move in moves))
        return cls(sequence, Mode(*mode), items, token_ids, dropped, *flags, restores, snapshots, checkpoints, *rest)


def placeholder(row: int) -> int:
    """The placeholder token for the one that the previous step chooses from its logits row `row`."""
    return -1 - row


def logits_positions(items: Iterable[PlanItem]) -> np.ndarray:
    """Positions in the batch whose logits are needed, ascending: [n] int64."""
    items = list(items)
    if all(item.num_tokens == 1 and item.logits != NO_LOGITS for item in items):
        return np.arange(len(items))  # decodes take this short cut
    counts, kinds = np.array([(item.num_tokens, item.logits) for item in items], dtype=np.int64).reshape(-1, 2).T
    ends = np.cumsum(counts)
    needs_all = (kinds == ALL_LOGITS) | (kinds == DRAFT_LOGITS)
    if not needs_all.any():
        return ends[kinds == LAST_LOGITS] - 1
    wanted = np.repeat(needs_all, counts)
    wanted[ends[kinds == LAST_LOGITS] - 1] = True
    return np.flatnonzero(wanted)


def adapter_rows(items: Sequence[PlanItem], start: int, stop: int) -> list[tuple[int, np.ndarray]]:
    """(adapter number, its rows counted from `start`) for each adapter used by tokens `[start, stop)` of the batch."""
    numbers = np.array([item.adapter for item in items], dtype=np.int64)
    if not numbers.any():
        return []
    own = np.repeat(numbers, [item.num_tokens for item in items])[start:stop]
    return [(int(number), np.flatnonzero(own == number)) for number in np.unique(own) if number]
