"""CPU graphs: decode steps of a CPU rank, recorded once and replayed without Python between the kernels."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ulysses_infer.attention.backend import AttentionBackend
from ulysses_infer.attention.native import NativeAttention
from ulysses_infer.cache.paged import CacheShape, PagedCache
from ulysses_infer.cache.states import StateCache
from ulysses_infer.model.model import ShiftModel
from ulysses_infer.native.arena import Arena
from ulysses_infer.native.cpu_graph import CpuGraph
from ulysses_infer.native.function import EXCHANGES, KINDS
from ulysses_infer.native.matmul import NativeMatmul
from ulysses_infer.parallel.groups import ProcessGroups
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.worker.graphs.static_inputs import CpuInputs
from ulysses_infer.worker.step import Finish, Step
from ulysses_infer.worker.step_context import StepContextBuilder, at_least_one
from ulysses_infer.worker.step_plan import NO_LOGITS, StepPlan

logger = logging.getLogger(__name__)

MAX_ROWS = 256  # in larger steps the work hides the overhead of Python

_Key = tuple[Mode, int, bool]  # mode, rows, whether whole logits are needed


@dataclass(frozen=True)
class _RecordedStep:
    graph: CpuGraph
    result: torch.Tensor | None  # of `finish`; valid until the next step
    inputs: tuple[object, ...]  # kept alive, because the graph holds only their addresses


class CpuGraphRunner:
    """Runs decode steps of one rank from CPU graphs: one per mode and number of rows.

    Implements `StepRunner`. Each rank decides for itself whether it records, replays or runs a step eagerly: the
    collectives are the same.
    """

    def __init__(
        self,
        model: ShiftModel,
        cache: PagedCache,
        groups: ProcessGroups,
        backend: NativeAttention,
        matmul: NativeMatmul,
        max_rows: int,
        states: StateCache | None = None,
    ) -> None:
        """max_rows: of a decode step, with drafted tokens."""
        self.model, self.groups, self.backend = model, groups, backend
        self._contexts = StepContextBuilder(cache, groups, backend, matmul, states)
        self._block_size = cache.shape.block_size
        self._max_rows = min(max_rows, MAX_ROWS)
        max_blocks = cache.shape.blocks_for(model.shape.max_model_len)
        self._inputs = CpuInputs(self._max_rows, max_blocks, len(cache.groups.attention_spans))
        self.arena = Arena()
        self._recorded: dict[_Key, _RecordedStep] = {}
        self._seen: set[_Key] = set()
        self._refused: dict[_Key, str] = {}
        self._weights_version = model.weights_version
        self._replayed: CpuGraph | None = None
        self._is_settled = True

    @property
    def is_settled(self) -> bool:
        """See `StepRunner.is_settled`: neither the first step of its kind nor the one that is recorded."""
        return self._is_settled

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that the last step spent in each kind of native call; empty if it was not replayed."""
        return replayed_seconds(self._replayed)

    @property
    def num_recorded(self) -> int:
        """Kinds of steps that are replayed."""
        return len(self._recorded)

    @property
    def refusals(self) -> list[str]:
        """Why steps that were to be recorded are not."""
        return list(dict.fromkeys(self._refused.values()))

    def accepts(self, plan: StepPlan) -> bool:
        """Whether the step has only decodes, few enough rows, and a shape that has occurred before or has drafts.

        Sizes with drafts are few (`sizes_between`), so they will recur. Steps with adapters run eagerly: the host
        decides which rows go through which adapter.
        """
        self._replayed, self._is_settled = None, True
        if not plan.runs_by_row or plan.num_tokens > self._max_rows:
            return False
        if plan.pools or any(item.adapter or item.logits == NO_LOGITS for item in plan.items):
            return False
        key = _key_of(plan)
        if key in self._refused:
            return False
        was_seen = key in self._seen
        self._seen.add(key)
        self._is_settled = key in self._recorded
        return was_seen or plan.num_tokens > len(plan.items)

    def num_rows(self, plan: StepPlan) -> int:
        """See `StepRunner.num_rows`."""
        return plan.num_tokens

    @torch.inference_mode()
    def run(self, step: Step, finish: Finish) -> torch.Tensor | None:
        """See `StepRunner.run`. `finish` is recorded too: it must be the same for plans of equal `full_logits`."""
        if self.model.weights_version != self._weights_version:
            self.invalidate()
        self._inputs.fill(step)
        key = _key_of(step.plan)
        recorded = self._recorded.get(key)
        if recorded is None:
            return self._record(key, finish)
        self._replayed = recorded.graph
        replay(recorded.graph, self.groups)
        return recorded.result

    def invalidate(self) -> None:
        """See `StepRunner.invalidate`. Each step is recorded again when it next occurs."""
        self._recorded.clear()
        self._weights_version = self.model.weights_version

    def _record(self, key: _Key, finish: Finish) -> torch.Tensor | None:
        """Run the step in the static inputs eagerly and keep a recording of it."""
        mode, size, _ = key
        attention = self._inputs.metadata(size, self.backend, self._block_size)
        slots = torch.from_numpy(self._inputs.slots[:size])
        context = self._contexts.build(mode, size, attention, slots=slots, query_lens=[1] * size)
        local = self._contexts.local_span(mode, size)
        token_ids, positions = (
            torch.from_numpy(at_least_one(values[local.start : local.stop]))
            for values in (self._inputs.token_ids, self._inputs.positions)
        )
        graph = CpuGraph(self.arena)
        rows = torch.arange(local.size)  # within the recording, each replay would call torch for it
        with graph.recording():
            result = finish(self.model.forward(token_ids, positions, rows, context))
        reason = graph.problem
        if reason is None:
            self._recorded[key] = _RecordedStep(graph, result, (token_ids, positions, rows, context))
        else:
            self._refused[key] = reason
            logger.debug("decode steps of %d rows in mode %s are not recorded: %s", size, mode, reason)
        return result


def replay(graph: CpuGraph, groups: ProcessGroups) -> None:
    """Replay a step; its exchanges count as those of an eager step do."""
    graph.replay()
    for kind in EXCHANGES:
        groups.clock.count(kind, graph.seconds_of(kind))


def replayed_seconds(graph: CpuGraph | None) -> dict[str, float]:
    """Seconds that the last replay of `graph` spent in each kind of native call; empty for None."""
    return {} if graph is None else {kind: graph.seconds_of(kind) for kind in KINDS}


def _key_of(plan: StepPlan) -> _Key:
    return plan.mode, plan.num_tokens, plan.full_logits


def wants_cpu_graphs(
    enforce_eager: bool | None,
    backend: AttentionBackend,
    matmul: NativeMatmul | None,
    shape: CacheShape,
    dtype: torch.dtype,
) -> bool:
    """Whether to record decode steps on a CPU. enforce_eager: None records where it is possible."""
    supported = isinstance(backend, NativeAttention) and shape.dtype == dtype
    # The host selects what tokens attend to, of keys with an index and of entries.
    supported = supported and matmul is not None and not shape.selects_keys
    if enforce_eager is False and not supported:
        logger.warning("runtime.enforce_eager = false has no effect: steps are recorded with native kernels only")
    return supported and not enforce_eager
