"""The step plan: what rank 0 tells every rank to run. Small, typed, and the same bytes on all of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgpack
import numpy as np

from ulysses_infer.parallel.layout import Mode

NO_LOGITS, LAST_LOGITS, ALL_LOGITS = 0, 1, 2


class PlanItem(NamedTuple):
    """One sequence's part of the step: `num_tokens` tokens from position `start`."""

    handle: int
    """The request's `index`."""
    start: int
    num_tokens: int
    new_block_ids: list[int]
    """Blocks appended to its tables, group by group; how many for each follows from `start` and `num_tokens`."""
    logits: int
    """Which rows need logits: none, the last one, or all (prompt log-probabilities)."""
    adapter: int = 0
    """Number of the LoRA adapter that its tokens go through; 0: none."""


class StepPlan(NamedTuple):
    """Everything a rank needs for one step, besides the block tables it has followed so far."""

    sequence: int
    mode: Mode
    items: list[PlanItem]
    token_ids: np.ndarray
    """[T] int32, the step's tokens in item order; negative ones (`placeholder`) are chosen by the step before."""
    dropped: list[int]
    """Sequences whose block tables are to be forgotten before the step: finished, aborted, preempted."""
    full_logits: bool
    """Whether rank 0 needs whole rows of logits; otherwise each rank's best token is enough."""
    keeps_tokens: bool = False
    """Whether every rank is to keep the chosen tokens, because the next step may be asked for before they are here."""

    @property
    def num_tokens(self) -> int:
        """Batched tokens T of the step."""
        return len(self.token_ids)

    @property
    def has_placeholders(self) -> bool:
        """Whether some of its tokens are those that the step before chooses."""
        return bool((self.token_ids < 0).any())

    @property
    def digest(self) -> int:
        """A checksum of what all ranks must agree on; compared on every rank in debug mode."""
        return zlib.crc32(self.encode())

    def encode(self) -> bytes:
        """The plan as bytes; `decode` is the inverse."""
        fields = (
            self.sequence,
            self.mode,
            self.items,
            self.token_ids.tobytes(),
            self.dropped,
            self.full_logits,
            self.keeps_tokens,
        )
        encoded: bytes = msgpack.packb(fields)
        return encoded

    @classmethod
    def decode(cls, data: bytes) -> StepPlan:
        """A plan from `encode`'s bytes."""
        sequence, mode, items, tokens, dropped, full_logits, keeps_tokens = msgpack.unpackb(data)
        token_ids = np.frombuffer(tokens, dtype=np.int32)
        return cls(
            sequence, Mode(*mode), [PlanItem(*item) for item in items], token_ids, dropped, full_logits, keeps_tokens
        )


def placeholder(row: int) -> int:
    """What stands for the token that the step before chooses in its row `row` of logits."""
    return -1 - row


def logits_positions(items: Iterable[PlanItem]) -> np.ndarray:
    """Where in the batch the rows that need logits are, ascending: [n] int64."""
    items = list(items)
    if all(item.num_tokens == 1 and item.logits != NO_LOGITS for item in items):
        return np.arange(len(items))  # a decode, where every microsecond counts
    counts, kinds = np.array([(item.num_tokens, item.logits) for item in items], dtype=np.int64).reshape(-1, 2).T
    ends = np.cumsum(counts)
    if not (kinds == ALL_LOGITS).any():
        return ends[kinds == LAST_LOGITS] - 1
    wanted = np.repeat(kinds == ALL_LOGITS, counts)
    wanted[ends[kinds == LAST_LOGITS] - 1] = True
    return np.flatnonzero(wanted)


def adapter_rows(items: Sequence[PlanItem], start: int, stop: int) -> list[tuple[int, np.ndarray]]:
    """(adapter, its tokens counted from `start`) for each that tokens `[start, stop)` of the batch go through."""
    numbers = np.array([item.adapter for item in items], dtype=np.int64)
    if not numbers.any():
        return []
    own = np.repeat(numbers, [item.num_tokens for item in items])[start:stop]
    return [(int(number), np.flatnonzero(own == number)) for number in np.unique(own) if number]
