"""One rank at work: a plan in, a forward pass of this rank's share, rows of logits out (on rank 0)."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from ulysses_infer.attention.backend import AttentionBackend, KernelAttention
from ulysses_infer.cache.paged import PagedCache
from ulysses_infer.errors import EngineDeadError
from ulysses_infer.model.context import StepContext
from ulysses_infer.model.model import ShiftModel
from ulysses_infer.model.sampling.head import argmax_pairs, best_of, joined, padded
from ulysses_infer.native.matmul import NativeMatmul
from ulysses_infer.parallel.groups import Groups
from ulysses_infer.parallel.layout import Span, token_spans
from ulysses_infer.worker.attention_inputs import StepMetadata
from ulysses_infer.worker.block_tables import BlockTables, StepArrays
from ulysses_infer.worker.cpu_graphs import CpuGraphRunner
from ulysses_infer.worker.cuda_graphs import CudaGraphRunner
from ulysses_infer.worker.next_tokens import NextTokenBuffer
from ulysses_infer.worker.step_plan import StepPlan, adapter_rows, logits_positions
from ulysses_infer.worker.transfer import DeviceToHostCopy, make_inputs

ROWS_PER_GATHER = 256  # bounds what rank 0 holds of whole logits rows at a time
Chooser = Callable[[int, torch.Tensor], torch.Tensor]
"""Called on rank 0 with (index of the first row, whole logits rows [n, V] float32); returns their tokens [n] int64."""


class Worker:
    """Runs step plans on one rank. Every rank runs the same plans in the same order."""

    def __init__(
        self,
        model: ShiftModel,
        cache: PagedCache,
        tables: BlockTables,
        groups: Groups,
        backend: AttentionBackend,
        matmul: NativeMatmul | None,
        device: torch.device,
        debug: bool = False,
    ) -> None:
        self.model, self.cache, self.tables = model, cache, tables
        self.groups, self.backend, self.matmul, self.device, self.debug = groups, backend, matmul, device, debug
        self.inputs = make_inputs(device)
        self.next_tokens = NextTokenBuffer(groups.world)
        self.graphs: CudaGraphRunner | CpuGraphRunner | None = None
        """Runs the steps that it has a graph for; None: every step is run layer by layer."""
        self._serves_kernels = device.type != "cpu" or isinstance(backend, KernelAttention)

    def run(self, plan: StepPlan, choose: Chooser | None = None) -> DeviceToHostCopy | None:
        """Run one step on this rank; a GPU is asked for it and not waited for. Collective.

        Rank 0 gets a token for every row that needs logits: the greedy one, or, for a plan with `full_logits`, what
        `choose` makes of the row. Other ranks, and steps without such rows, get None.
        """
        if self.debug:
            self._verify(plan)
        arrays = self.tables.apply(plan)
        rows = logits_positions(plan.items)
        finish = self._as_they_are if plan.full_logits or len(rows) == 0 else self._greedy
        size = None if self.graphs is None else self.graphs.bucket(plan)
        if self.graphs is None or size is None:
            result = finish(self._forward(plan, arrays, rows))
        else:  # as every rank knows, or whichever: a graph exchanges what the step did
            result = self.graphs.run(plan, arrays, rows, size, self.next_tokens, finish)
        if len(rows) == 0:
            return None
        tokens = self._chosen(result, choose) if plan.full_logits else result
        if plan.keeps_tokens:
            self.next_tokens.share(tokens, len(rows), self.device)
        return None if tokens is None else DeviceToHostCopy(tokens)

    @staticmethod
    def _as_they_are(logits: torch.Tensor) -> torch.Tensor | None:
        return logits

    def _forward(self, plan: StepPlan, arrays: StepArrays, rows: np.ndarray) -> torch.Tensor:
        """Run the step layer by layer. Returns [n, V/W] logits of `rows`."""
        spans = token_spans(plan.num_tokens, plan.mode.sp)
        mine = spans[self.groups.place(plan.mode).token_index]
        metadata = StepMetadata(arrays, self._serves_kernels)
        token_ids, positions, wanted, *sent = self.inputs.send(
            [
                _at_least_one(plan.token_ids[mine.start : mine.stop].astype(np.int64)),
                _at_least_one(arrays.positions[mine.start : mine.stop]),
                _within(rows, mine) - mine.start,
                *metadata.to_send(),
            ]
        )
        if plan.has_placeholders:
            self.next_tokens.fill_placeholders(token_ids)
        attention = metadata.of_groups(sent)
        context = StepContext(
            collectives=self.groups.by_mode[plan.mode],
            token_spans=spans,
            logits_counts=[len(_within(rows, span)) for span in spans],
            attention=attention[0],
            cache=self.cache,
            backend=self.backend,
            matmul=self.matmul,
            adapters=[
                (number, torch.from_numpy(rows).to(self.device))
                for number, rows in adapter_rows(plan.items, mine.start, mine.stop)
            ],
            attention_of_layers=self.cache.groups.each_layer(attention),
        )
        return self.model.forward(token_ids, positions, wanted, context)

    def _greedy(self, logits: torch.Tensor) -> torch.Tensor | None:
        """The best token of every row: each rank offers its own vocabulary's, rank 0 compares."""
        pairs = self._gather(argmax_pairs(logits, self.model.vocabulary))
        return None if pairs is None else best_of(pairs)

    def _gather(self, shard: torch.Tensor) -> torch.Tensor | None:
        """Every rank's `shard` in the order of ranks, on rank 0: [W, *shape]; None elsewhere."""
        started = time.perf_counter()
        shards = self.groups.gather_to_first(shard)
        self.groups.clock.add("gather", started)
        return shards

    def _chosen(self, logits: torch.Tensor | None, choose: Chooser | None) -> torch.Tensor | None:
        """Whole rows to rank 0, a bounded number at a time, and what it makes of them."""
        assert logits is not None
        vocab_size, world_size = self.model.shape.vocab_size, self.groups.layout.world_size
        chosen = []
        for start in range(0, logits.shape[0], ROWS_PER_GATHER):
            shard = padded(logits[start : start + ROWS_PER_GATHER], vocab_size, world_size)
            shards = self._gather(shard)
            # Rank 0 alone chooses: it samples, the others go on.
            if shards is not None and choose is not None:
                in_order = [shards[rank] for rank in self.groups.shard_order]
                chosen.append(choose(start, joined(in_order, vocab_size)))
        return torch.cat(chosen) if chosen else None

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
