"""The step plan: what rank 0 tells every rank to run. Small, typed, and the same bytes on all of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgpack
import numpy as np

from ulysses_infer.engine.batch import Batch
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
    """[T] int32, the step's tokens in item order."""
    dropped: list[int]
    """Sequences whose block tables are to be forgotten before the step: finished, aborted, preempted."""
    full_logits: bool
    """Whether rank 0 needs whole rows of logits; otherwise each rank's best token is enough."""

    @property
    def num_tokens(self) -> int:
        """Batched tokens T of the step."""
        return len(self.token_ids)

    @property
    def digest(self) -> int:
        """A checksum of what all ranks must agree on; compared on every rank in debug mode."""
        return zlib.crc32(self.encode())

    def encode(self) -> bytes:
        """The plan as bytes; `decode` is the inverse."""
        fields = (self.sequence, self.mode, self.items, self.token_ids.tobytes(), self.dropped, self.full_logits)
        encoded: bytes = msgpack.packb(fields)
        return encoded

    @classmethod
    def decode(cls, data: bytes) -> StepPlan:
        """A plan from `encode`'s bytes."""
        sequence, mode, items, tokens, dropped, full_logits = msgpack.unpackb(data)
        token_ids = np.frombuffer(tokens, dtype=np.int32)
        return cls(sequence, Mode(*mode), [PlanItem(*item) for item in items], token_ids, dropped, full_logits)


def make_plan(sequence: int, mode: Mode, batch: Batch, dropped: Sequence[int], full_logits: bool) -> StepPlan:
    """The plan of `batch` in `mode`."""
    items, tokens = [], []
    for request, start, count, new_block_ids, samples in batch.scheduled:
        tokens += request.token_ids_from(start, start + count)
        wants_prompt = request.params.prompt_logprobs is not None and start < request.num_prompt_tokens
        logits = ALL_LOGITS if wants_prompt else LAST_LOGITS if samples else NO_LOGITS
        items.append(PlanItem(request.index, start, count, new_block_ids, logits, request.adapter))
    return StepPlan(sequence, mode, items, np.array(tokens, dtype=np.int32), list(dropped), full_logits)


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
