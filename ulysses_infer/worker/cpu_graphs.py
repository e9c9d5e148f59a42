"""Decode steps of a CPU rank, recorded once and then made again without Python between the kernels."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

from ulysses_infer.attention.backend import AttentionBackend, AttentionMetadata
from ulysses_infer.attention.native import NativeAttention
from ulysses_infer.cache.paged import CacheShape, PagedCache
from ulysses_infer.model.context import StepContext
from ulysses_infer.model.model import ShiftModel
from ulysses_infer.native.arena import Arena
from ulysses_infer.native.cpu_graph import CpuGraph
from ulysses_infer.native.function import EXCHANGES, KINDS
from ulysses_infer.native.matmul import NativeMatmul
from ulysses_infer.parallel.groups import Groups
from ulysses_infer.parallel.layout import Mode, token_spans
from ulysses_infer.worker.block_tables import GroupArrays, StepArrays
from ulysses_infer.worker.cuda_graphs import Finish
from ulysses_infer.worker.next_tokens import NextTokenBuffer
from ulysses_infer.worker.step_plan import NO_LOGITS, StepPlan

logger = logging.getLogger(__name__)

LARGEST = 256  # rows; in larger steps the work hides what Python adds


_Key = tuple[Mode, int, bool]  # mode, rows, whether the logits are wanted


@dataclass(frozen=True)
class _Recorded:
    graph: CpuGraph
    result: torch.Tensor | None  # of `finish`, valid until the next step
    inputs: tuple[object, ...]  # alive, because the graph has but their addresses


class CpuGraphRunner:
    """Runs the decode steps of one rank from graphs, one for each mode and number of rows that comes more than once.

    Whether a step is recorded, repeated or run as ever is each rank's own affair: its exchanges are the same.
    """

    def __init__(
        self,
        model: ShiftModel,
        cache: PagedCache,
        groups: Groups,
        backend: NativeAttention,
        matmul: NativeMatmul,
        max_num_seqs: int,
    ) -> None:
        self.model, self.cache, self.groups, self.backend, self.matmul = model, cache, groups, backend, matmul
        self._largest = min(max_num_seqs, LARGEST)
        width = cache.shape.blocks_for(model.shape.max_model_len)
        self._token_ids, self._positions = np.zeros((2, self._largest), dtype=np.int64)
        self._groups = [_GroupInputs(self._largest, width) for _ in cache.groups.attention_spans]
        self._arena = Arena()
        self._recorded: dict[_Key, _Recorded] = {}
        self._seen: set[_Key] = set()
        self._refused: set[Mode] = set()
        self._weights_version = model.weights_version
        self._replayed: CpuGraph | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """By kind of native call, what the last step spent in them; empty if it was not repeated from a graph."""
        return {} if self._replayed is None else {kind: self._replayed.seconds_of(kind) for kind in KINDS}

    def bucket(self, plan: StepPlan) -> int | None:
        """The number of rows, if `plan` is a step to be recorded or repeated: one token a sequence, and not too many.

        Steps with adapters are not: which rows go through which is decided on the host.
        """
        self._replayed, count = None, plan.num_tokens
        if count != len(plan.items) or count > self._largest or plan.mode in self._refused:
            return None
        if any(item.adapter or item.logits == NO_LOGITS for item in plan.items):
            return None
        key = plan.mode, count, plan.full_logits
        if key in self._seen:
            return count
        self._seen.add(key)
        return None

    @torch.inference_mode()
    def run(
        self,
        plan: StepPlan,
        arrays: StepArrays,
        rows: np.ndarray,
        size: int,
        next_tokens: NextTokenBuffer,
        finish: Finish,
    ) -> torch.Tensor | None:
        """Run `plan`, of `size` rows; returns what `finish` makes of all their logits, valid until the next run.

        `finish` is recorded too: plans that differ in `full_logits` may have others, those that do not, the same.
        """
        if self.model.weights_version != self._weights_version:
            self.forget()
        self._token_ids[:size] = plan.token_ids
        self._positions[:size] = arrays.positions
        if plan.has_placeholders:
            next_tokens.fill_placeholders(torch.from_numpy(self._token_ids[:size]))
        for inputs, group in zip(self._groups, arrays.groups, strict=True):
            inputs.fill(group, size)
        key = plan.mode, size, plan.full_logits
        recorded = self._recorded.get(key)
        if recorded is None:
            return self._record(key, finish)
        self._replayed = recorded.graph
        recorded.graph.replay()
        for kind in EXCHANGES:
            self.groups.clock.count(kind, recorded.graph.seconds_of(kind))
        return recorded.result

    def forget(self) -> None:
        """The cache or the weights have moved: each step is recorded again when it next comes."""
        self._recorded.clear()
        self._weights_version = self.model.weights_version

    def _record(self, key: _Key, finish: Finish) -> torch.Tensor | None:
        """Run the step that the inputs hold, layer by layer, and keep what it did."""
        mode, size, _ = key
        context = self._context(mode, size)
        mine = context.token_spans[context.collectives.place.token_index]
        ids, positions = (_at_least_one(x[mine.start : mine.stop]) for x in (self._token_ids, self._positions))
        rows, graph = torch.arange(mine.size), CpuGraph(self._arena)
        with graph.recording():
            result = finish(self.model.forward(ids, positions, rows, context))
        reason = graph.problem
        if reason is None and graph.num_torch_calls > graph.num_native_calls:
            reason = f"{graph.num_torch_calls} of its operations are torch's, {graph.num_native_calls} native"
        if reason is None:
            self._recorded[key] = _Recorded(graph, result, (ids, positions, context))
        else:
            self._refused.add(mode)
            logger.debug("decode steps of mode %s are not recorded: %s", mode, reason)
        return result

    def _context(self, mode: Mode, size: int) -> StepContext:
        spans = token_spans(size, mode.sp)
        attention = [inputs.metadata(size, self.backend, self.cache.shape.block_size) for inputs in self._groups]
        return StepContext(
            collectives=self.groups.by_mode[mode],
            token_spans=spans,
            logits_counts=[span.size for span in spans],
            attention=attention[0],
            cache=self.cache,
            backend=self.backend,
            matmul=self.matmul,
            attention_of_layers=self.cache.groups.each_layer(attention),
        )


class _GroupInputs:
    """The fixed memory from which recorded steps read the sequences of one cache group."""

    def __init__(self, largest: int, width: int) -> None:
        self._slots = np.zeros(largest, dtype=np.int64)
        self._contexts = np.ones(largest, dtype=np.int64)
        self._tables = np.zeros((largest, width), dtype=np.int64)

    def fill(self, group: GroupArrays, size: int) -> None:
        """Write a step of `size` rows. What is further right in the tables is of other steps: no length attention_spans it."""
        self._slots[:size], self._contexts[:size] = group.slots, group.context_lens
        self._tables[:size, : group.block_tables.shape[1]] = group.block_tables

    def metadata(self, size: int, backend: NativeAttention, block_size: int) -> AttentionMetadata:
        """The first `size` rows, for `backend`. Nobody may read lengths from lists: those would not change."""
        slots, tables = torch.from_numpy(self._slots[:size]), torch.from_numpy(self._tables[:size])
        made = AttentionMetadata(slots, [], [], tables)
        backend.fix(made, self._contexts[:size], block_size)
        return made


def wants_cpu_graphs(
    enforce_eager: bool | None,
    backend: AttentionBackend,
    matmul: NativeMatmul | None,
    shape: CacheShape,
    dtype: torch.dtype,
) -> bool:
    """Whether decode steps are to be recorded on a CPU; `enforce_eager` None: where they can."""
    attends = isinstance(backend, NativeAttention) and shape.dtype == dtype and not shape.values_in_keys
    can = attends and matmul is not None
    if enforce_eager is False and not can:
        logger.warning("runtime.enforce_eager = false has no effect: steps are recorded on native kernels only")
    return can and not enforce_eager


def _at_least_one(values: np.ndarray) -> torch.Tensor:
    """In place; a slice without tokens runs a stand-in, as in any step."""
    return torch.from_numpy(values) if len(values) else torch.zeros(1, dtype=torch.int64)
