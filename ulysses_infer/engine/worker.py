"""One rank at work: a plan in, a forward pass of this rank's share, rows of logits out (on rank 0)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ulysses_infer.attention.backend import AttentionBackend, AttentionMetadata
from ulysses_infer.cache.paged import PagedCache
from ulysses_infer.engine.plan import StepPlan, logits_positions
from ulysses_infer.engine.tables import BlockTables, StepArrays
from ulysses_infer.errors import EngineDeadError
from ulysses_infer.model.context import StepContext
from ulysses_infer.model.head import argmax_pairs, best_of, joined, padded
from ulysses_infer.model.model import ShiftModel
from ulysses_infer.parallel.collectives import gather_to_first
from ulysses_infer.parallel.groups import Groups
from ulysses_infer.parallel.layout import Span, token_spans

ROWS_PER_GATHER = 256  # bounds what rank 0 holds of whole logits rows at a time
RowsConsumer = Callable[[int, torch.Tensor], None]
"""Called on rank 0 with (index of the first row, whole logits rows [n, V] float32)."""


class Worker:
    """Runs step plans on one rank. Every rank runs the same plans in the same order."""

    def __init__(
        self, model: ShiftModel, cache: PagedCache, tables: BlockTables, groups: Groups,
        backend: AttentionBackend, device: torch.device, debug: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.cache, self.tables = model, cache, tables
        self.groups, self.backend, self.device, self.debug = groups, backend, device, debug

    def run(self, plan: StepPlan, on_rows: RowsConsumer | None = None) -> list[int]:
        """Run one step on this rank. Collective.

        Rank 0 gets the greedy token of every row that needs logits, or, for a plan with `full_logits`, the rows
        themselves through `on_rows` and an empty list. Other ranks get an empty list.
        """
        if self.debug:
            self._verify(plan)
        arrays = self.tables.apply(plan)
        spans = token_spans(plan.num_tokens, plan.mode.sp)
        mine = spans[self.groups.place(plan.mode).token_index]
        rows = logits_positions(plan.items)
        context = self._context(plan, arrays, spans, rows)
        logits = self.model.forward(
            self._tensor(_at_least_one(plan.token_ids[mine.start : mine.stop].astype(np.int64))),
            self._tensor(_at_least_one(arrays.positions[mine.start : mine.stop])),
            self._tensor(_within(rows, mine) - mine.start),
            context,
        )
        if len(rows) == 0:
            return []
        return self._send_rows(logits, on_rows) if plan.full_logits else self._greedy(logits)

    def _context(self, plan: StepPlan, arrays: StepArrays, spans: list[Span], rows: np.ndarray) -> StepContext:
        metadata = AttentionMetadata(
            self._tensor(arrays.slots), arrays.query_lens, arrays.context_lens, self._tensor(arrays.block_tables)
        )
        return StepContext(
            collectives=self.groups.by_mode[plan.mode],
            token_spans=spans,
            logits_counts=[len(_within(rows, span)) for span in spans],
            attention=metadata,
            cache=self.cache,
            backend=self.backend,
        )

    def _greedy(self, logits: torch.Tensor) -> list[int]:
        """The best token of every row: each rank offers its own vocabulary's, rank 0 compares."""
        pairs = self._gather(argmax_pairs(logits, self.model.vocabulary))
        return [] if pairs is None else best_of(pairs)

    def _gather(self, shard: torch.Tensor) -> list[torch.Tensor] | None:
        """Every rank's `shard` in shard order, on rank 0; None elsewhere."""
        with self.groups.clock.timing("gather"):
            return gather_to_first(shard, self.groups.world, self.groups.rank, self.groups.shard_order)

    def _send_rows(self, logits: torch.Tensor, on_rows: RowsConsumer | None) -> list[int]:
        """Whole rows to rank 0, a bounded number at a time."""
        vocab_size, world_size = self.model.shape.vocab_size, self.groups.layout.world_size
        for start in range(0, logits.shape[0], ROWS_PER_GATHER):
            shard = padded(logits[start : start + ROWS_PER_GATHER], vocab_size, world_size)
            shards = self._gather(shard)
            # Rank 0 alone has a consumer: it samples, the others go on.
            if shards is not None and on_rows is not None:
                on_rows(start, joined(shards, vocab_size))
        return []

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _verify(self, plan: StepPlan) -> None:
        """Debug mode: every rank must have the same plan; a difference is a bug and ends the engine."""
        if self.groups.control is None:
            return
        digests: list[int] = [0] * self.groups.layout.world_size
        torch.distributed.all_gather_object(digests, plan.digest, group=self.groups.control)
        if len(set(digests)) != 1:
            raise EngineDeadError(f"ranks disagree on step {plan.sequence}: digests {digests}; please report this")


def _at_least_one(values: np.ndarray) -> np.ndarray:
    """With fewer tokens than slices some ranks have none; models cannot run on nothing, so those run a token that
    never leaves the rank: attention neither sends nor receives it."""
    return values if len(values) else np.zeros(1, dtype=np.int64)


def _within(rows: np.ndarray, span: Span) -> np.ndarray:
    first, last = np.searchsorted(rows, [span.start, span.stop])
    return rows[first:last]
