"""One rank's share of a step: a step plan in, a forward pass, and on rank 0 the chosen tokens out."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from ulysses_infer.attention.backend import AttentionBackend
from ulysses_infer.cache.paged import PagedCache
from ulysses_infer.cache.states import StateCache
from ulysses_infer.errors import EngineDeadError
from ulysses_infer.model.model import ShiftModel
from ulysses_infer.model.sampling.head import concat_shards, global_argmax, local_argmax, pad_shard
from ulysses_infer.native.matmul import NativeMatmul
from ulysses_infer.parallel.groups import ProcessGroups
from ulysses_infer.worker.block_tables import BlockTables
from ulysses_infer.worker.drafting.drafter import Drafter
from ulysses_infer.worker.eager import EagerRunner
from ulysses_infer.worker.next_tokens import NextTokenBuffer
from ulysses_infer.worker.offload.mover import BlockMover
from ulysses_infer.worker.state_slots import StateSlots
from ulysses_infer.worker.step import Step, StepObserver, StepProfiler, StepRunner
from ulysses_infer.worker.step_context import StepContextBuilder
from ulysses_infer.worker.step_plan import StepPlan, logits_positions
from ulysses_infer.worker.transfer import DeviceToHostCopy

ROWS_PER_GATHER = 256  # bounds the whole logits rows that rank 0 holds at a time
TokenChooser = Callable[[int, torch.Tensor], torch.Tensor]
"""Called on rank 0 with (index of the first row, logits [n, V] float32); returns the tokens [n] int64."""
HiddenReader = Callable[[torch.Tensor], None]
"""Called on rank 0 with what the vocabulary head read for every row that needs logits, [n, D]."""


class Worker:
    """Runs step plans on one rank. All ranks run the same plans in the same order."""

    def __init__(
        self,
        model: ShiftModel,
        cache: PagedCache,
        tables: BlockTables,
        groups: ProcessGroups,
        backend: AttentionBackend,
        matmul: NativeMatmul | None,
        device: torch.device,
        debug: bool = False,
        states: StateCache | None = None,
    ) -> None:
        """states: of recurrent layers; None if the model has none."""
        self.model, self.cache, self.tables, self.states = model, cache, tables, states
        self.groups, self.device, self.debug = groups, device, debug
        self.contexts = StepContextBuilder(cache, groups, backend, matmul, states)
        self._state_slots = None if states is None else StateSlots(states)
        self.eager = EagerRunner(model, self.contexts, device)
        self.graphs: StepRunner | None = None
        """Runs the decode steps it accepts faster than `eager`; None: every step is run eagerly."""
        self.mixed_graphs: StepRunner | None = None
        """Runs the other steps it accepts faster than `eager`; None: they are run eagerly."""
        self.next_tokens = NextTokenBuffer(groups.world)
        self.drafter: Drafter | None = None
        """This rank's part of a model that drafts tokens for this one; None without."""

        self.offload: BlockMover | None = None
        """This rank's part of the tier below the cache; None without."""

        self.profiler: StepProfiler | None = None
        """Records a trace of every step; None: nothing."""

        self.observer: StepObserver | None = None
        """Told of every step; None: nothing."""

    @property
    def backend(self) -> AttentionBackend:
        """The attention backend."""
        return self.contexts.backend

    @property
    def matmul(self) -> NativeMatmul | None:
        """The matrix products of linear layers; None is torch."""
        return self.contexts.matmul

    def run(
        self, plan: StepPlan, choose: TokenChooser | None = None, pool: HiddenReader | None = None
    ) -> DeviceToHostCopy | None:
        """Run one step on this rank; a GPU is not waited for. Collective.

        Rank 0 gets a token for every row that needs logits: the greedy one or, for a plan with `full_logits`, the one
        that `choose` returns. Other ranks, and steps without such rows, get None.
        """
        if self.debug:
            self._verify(plan)
        if plan.moves:
            assert self.offload is not None
            self.offload.apply(plan.moves)
        head_inputs: list[torch.Tensor] | None = [] if plan.pools else None
        step = Step(plan, self.tables.apply(plan), logits_positions(plan.items), self.next_tokens, head_inputs)
        num_rows = len(step.logits_rows)
        finish = _keep_logits if plan.full_logits or num_rows == 0 else self._greedy_tokens
        if self._state_slots is not None:
            self._state_slots.prepare(plan, step.arrays)
        runner = self._runner_for(plan)
        with nullcontext() if self.profiler is None else self.profiler.annotated(plan):
            result = runner.run(step, finish)
        if self.observer is not None:
            self.observer.observe(step, runner.num_rows(plan))
        if self._state_slots is not None:
            self._state_slots.save(plan, step.arrays)
        if num_rows == 0:
            return None
        if head_inputs and pool is not None:  # rank-divergent: only rank 0 has requests
            pool(head_inputs[-1])
        tokens = self._choose_tokens(result, choose) if plan.full_logits else result
        if plan.keeps_tokens:
            self.next_tokens.share(tokens, num_rows, self.device)
        return None if tokens is None else DeviceToHostCopy(tokens)

    def _runner_for(self, plan: StepPlan) -> StepRunner:
        # Rank-divergent with CPU graphs: one rank may replay while another records. Their collectives are the same.
        accepting = [graphs for graphs in self.all_graphs if graphs.accepts(plan)]  # each is asked: see `is_settled`
        return accepting[0] if accepting else self.eager

    @property
    def is_settled(self) -> bool:
        """Whether the last step took as long as others of its kind will (`StepRunner.is_settled`)."""
        return all(graphs.is_settled for graphs in self.all_graphs)

    @property
    def all_graphs(self) -> list[StepRunner]:
        """The runners with recorded or captured steps."""
        return [graphs for graphs in (self.graphs, self.mixed_graphs) if graphs is not None]

    def take_caches(self) -> None:
        """Allocate the memory of keys, values, states and the tier below, after `release_caches`."""
        self.cache.take()
        if self.states is not None:
            self.states.take()
        if self.drafter is not None:
            self.drafter.take_caches()
        if self.offload is not None:
            self.offload.take()

    def release_caches(self) -> None:
        """Free the memory of keys, values, states and the tier below, until `take_caches`."""
        self.cache.release()
        if self.states is not None:
            self.states.release()
        if self.drafter is not None:
            self.drafter.release_caches()
        if self.offload is not None:
            self.offload.release()

    def _greedy_tokens(self, logits: torch.Tensor) -> torch.Tensor | None:
        """The best token of every row: each rank finds the best of its vocabulary shard, rank 0 compares."""
        pairs = self._gather(local_argmax(logits, self.model.vocabulary))
        return None if pairs is None else global_argmax(pairs)

    def _gather(self, shard: torch.Tensor) -> torch.Tensor | None:
        """Every rank's `shard` in rank order, on rank 0: [W, *shape]; None elsewhere."""
        started = time.perf_counter()
        shards = self.groups.gather_to_first(shard)
        self.groups.clock.add("gather", started)
        return shards

    def _choose_tokens(self, logits: torch.Tensor | None, choose: TokenChooser | None) -> torch.Tensor | None:
        """Gather whole logits rows on rank 0, at most ROWS_PER_GATHER at a time, and choose their tokens there."""
        assert logits is not None
        vocab_size, world_size = self.model.shape.vocab_size, self.groups.layout.world_size
        chosen = []
        for start in range(0, logits.shape[0], ROWS_PER_GATHER):
            shard = pad_shard(logits[start : start + ROWS_PER_GATHER], vocab_size, world_size)
            shards = self._gather(shard)
            # Rank-divergent: only rank 0 samples.
            if shards is not None and choose is not None:
                in_order = [shards[rank] for rank in self.groups.shard_order]
                chosen.append(choose(start, concat_shards(in_order, vocab_size)))
        return torch.cat(chosen) if chosen else None

    def _verify(self, plan: StepPlan) -> None:
        """Debug mode: check that every rank has the same plan. A difference is a bug and ends the engine."""
        if self.groups.control is None:
            return
        digests: list[int] = [0] * self.groups.layout.world_size
        torch.distributed.all_gather_object(digests, plan.digest, group=self.groups.control)
        if len(set(digests)) != 1:
            raise EngineDeadError(f"ranks disagree on step {plan.sequence}: digests {digests}; please report this bug")


def _keep_logits(logits: torch.Tensor) -> torch.Tensor | None:
    return logits
