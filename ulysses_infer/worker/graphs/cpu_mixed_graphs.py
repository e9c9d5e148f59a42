"""CPU graphs of steps with prompt tokens: all layers for a fixed number of tokens, attention included.

The attention kernel reads the sequences from fixed memory, so a graph depends on the number of tokens alone, not on how
they are divided over sequences. Padding tokens are sequences of one token in a scratch block of the cache. The output
embedding runs after the graph, on the rows that need logits.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch

from ulysses_infer.arithmetic import round_up
from ulysses_infer.attention.backend import AttentionMetadata
from ulysses_infer.attention.native import NativeAttention, RecordedSequences
from ulysses_infer.cache.paged import PagedCache
from ulysses_infer.model.context import StepContext
from ulysses_infer.model.model import ShiftModel
from ulysses_infer.native.arena import Arena
from ulysses_infer.native.cpu_graph import CpuGraph
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.worker.block_tables import GroupArrays
from ulysses_infer.worker.graphs.cpu_graphs import replay, replayed_seconds
from ulysses_infer.worker.step import Finish, Step
from ulysses_infer.worker.step_context import StepContextBuilder, rows_within
from ulysses_infer.worker.step_plan import StepPlan

logger = logging.getLogger(__name__)

SMALLEST = 32  # tokens per slice; fewer would be padded by too large a part
LARGEST = 512  # in larger steps the work hides the overhead of Python
GRANULARITY = 8  # tokens per slice: kernels compute whole vectors of rows, so that padding costs little

_Key = tuple[Mode, int]  # mode, tokens with padding


class _Recorded(NamedTuple):
    graph: CpuGraph
    hidden: torch.Tensor  # [t, D], valid until the next step
    inputs: tuple[object, ...]  # kept alive, because the graph holds only their addresses


class CpuMixedGraphRunner:
    """Runs steps of prompt tokens and decodes of one rank from CPU graphs, padded to few sizes. A `StepRunner`.

    All ranks pad alike, so that collectives fit together. Each rank decides for itself whether it records or replays.
    """

    def __init__(
        self,
        model: ShiftModel,
        contexts: StepContextBuilder,
        backend: NativeAttention,
        arena: Arena,
        max_num_seqs: int,
        max_tokens: int,
    ) -> None:
        """arena: of this rank's other CPU graphs. The cache must have a scratch block. `model` must have a fused layer
        loop and no recurrent states."""
        cache, modes = contexts.cache, contexts.groups.by_mode
        self.model, self._contexts, self._arena = model, contexts, arena
        self._max_num_seqs, self._max_tokens = max_num_seqs, min(max_tokens, LARGEST)
        most_padding = GRANULARITY * max(mode.sp for mode in modes)
        longest = model.shape.max_model_len
        self._inputs = _Inputs(cache, self._max_tokens + most_padding, max_num_seqs + most_padding, longest, backend)
        self._recorded: dict[_Key, _Recorded] = {}
        self._refused: set[_Key] = set()
        self._weights_version = model.weights_version
        self._replayed: CpuGraph | None = None
        self._is_settled = True

    @property
    def seconds(self) -> dict[str, float]:
        """See `CpuGraphRunner.seconds`."""
        return replayed_seconds(self._replayed)

    @property
    def is_settled(self) -> bool:
        """See `StepRunner.is_settled`: not the step that is recorded."""
        return self._is_settled

    @property
    def num_recorded(self) -> int:
        """Kinds of steps that are replayed."""
        return len(self._recorded)

    def accepts(self, plan: StepPlan) -> bool:
        """Whether the step has prompt tokens and few enough in all, and no adapters: the host decides which rows go
        through which adapter."""
        self._replayed, self._is_settled = None, True
        if plan.runs_by_row or not SMALLEST * plan.mode.sp <= plan.num_tokens <= self._max_tokens:
            return False
        fits = plan.num_sequences <= self._max_num_seqs
        return fits and not plan.pools and not any(item.adapter for item in plan.items)

    def num_rows(self, plan: StepPlan) -> int:
        """See `StepRunner.num_rows`."""
        return round_up(plan.num_tokens, GRANULARITY * plan.mode.sp)

    @torch.inference_mode()
    def run(self, step: Step, finish: Finish) -> torch.Tensor | None:
        """See `StepRunner.run`."""
        if self.model.weights_version != self._weights_version:
            self.invalidate()
        mode, size = step.plan.mode, self.num_rows(step.plan)
        self._inputs.fill(step, size)
        local = self._contexts.local_span(mode, size)
        context = self._contexts.build(mode, size, self._inputs.metadata(size), step.logits_rows)
        hidden = self._hidden((mode, size), context)
        rows = torch.from_numpy(rows_within(step.logits_rows, local) - local.start)
        return finish(self.model.logits(hidden[: local.size], rows, context))

    def invalidate(self) -> None:
        """See `StepRunner.invalidate`. Each step is recorded again when it next occurs."""
        self._recorded.clear()
        self._weights_version = self.model.weights_version

    def _hidden(self, key: _Key, context: StepContext) -> torch.Tensor:
        """What the head reads. Rank-divergent: a rank may replay while another records."""
        recorded = self._recorded.get(key)
        if recorded is not None:
            self._replayed = recorded.graph
            replay(recorded.graph, self._contexts.groups)
            return recorded.hidden
        local = self._contexts.local_span(*key)
        token_ids, positions = torch.from_numpy(self._inputs.tokens[:, local.start : local.stop])
        if key in self._refused:
            return self.model.hidden(token_ids, positions, context)
        return self._record(key, token_ids, positions, context)

    def _record(
        self, key: _Key, token_ids: torch.Tensor, positions: torch.Tensor, context: StepContext
    ) -> torch.Tensor:
        self._is_settled = False
        graph = CpuGraph(self._arena)
        with graph.recording():
            hidden = self.model.hidden(token_ids, positions, context)
        if graph.problem is None:
            self._recorded[key] = _Recorded(graph, hidden, (token_ids, positions, context))
        else:
            self._refused.add(key)
            logger.debug("steps of %d tokens in mode %s are not recorded: %s", key[1], key[0], graph.problem)
        return hidden


class _Inputs:
    """What the graphs read: the first n tokens are those of a graph of n tokens."""

    def __init__(
        self, cache: PagedCache, max_tokens: int, max_sequences: int, max_model_len: int, backend: NativeAttention
    ) -> None:
        """max_tokens, max_sequences: with padding."""
        self.tokens = np.zeros((2, max_tokens), dtype=np.int64)  # ids, positions
        shape = max_sequences, cache.shape.blocks_for(max_model_len)
        self._groups = [
            _GroupInputs(max_tokens, shape, cache.scratch_block(group), cache.shape.block_size, backend)
            for group in range(len(cache.groups.attention_spans))
        ]

    def fill(self, step: Step, size: int) -> None:
        """Write a step, padded to `size` tokens."""
        count = step.plan.num_tokens
        self.tokens[:, :count] = step.plan.token_ids, step.arrays.positions
        step.fill_placeholders(torch.from_numpy(self.tokens[0, :count]))
        self.tokens[:, count:size] = 0
        lens = np.array([*step.arrays.query_lens, *[1] * (size - count)], dtype=np.int64)
        for group, arrays in zip(self._groups, step.arrays.groups, strict=True):
            group.fill(arrays, lens, size - count)

    def metadata(self, size: int) -> list[AttentionMetadata]:
        """The first `size` tokens of each cache group."""
        return [group.metadata(size) for group in self._groups]


class _GroupInputs:
    """What the layers of one cache group read."""

    def __init__(
        self, max_tokens: int, shape: tuple[int, int], scratch_block: int, block_size: int, backend: NativeAttention
    ) -> None:
        """shape: most sequences, most blocks of one."""
        self._scratch_block, self._scratch_slot = scratch_block, scratch_block * block_size
        self._slots = np.zeros(max_tokens, dtype=np.int64)
        self._tables = np.zeros(shape, dtype=np.int64)
        self._sequences = RecordedSequences(torch.from_numpy(self._tables), block_size)
        self._backend = backend

    def fill(self, arrays: GroupArrays, lens: np.ndarray, padding: int) -> None:
        """lens: query tokens of each sequence, the last `padding` of which are padding tokens."""
        (count, width), total = arrays.block_tables.shape, len(arrays.slots)
        self._slots[:total] = arrays.slots
        self._slots[total : total + padding] = self._scratch_slot
        # Columns further right belong to earlier steps; no context length covers them.
        self._tables[:count, :width] = arrays.block_tables
        self._tables[count : count + padding, 0] = self._scratch_block
        self._sequences.fill(lens, np.array([*arrays.context_lens, *[1] * padding], dtype=np.int64))

    def metadata(self, size: int) -> AttentionMetadata:
        """Of the first `size` tokens; its lists are empty, because they would not change from replay to replay."""
        made = AttentionMetadata(torch.from_numpy(self._slots[:size]), [], [], torch.from_numpy(self._tables))
        self._backend.attend_recorded(made, self._sequences)
        return made
