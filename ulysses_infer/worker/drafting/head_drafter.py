"""A head that drafts from hidden states of the served model: one rank's part."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ulysses_infer.attention.backend import AttentionBackend, KernelAttention
from ulysses_infer.cache.paged import PagedCache
from ulysses_infer.model.context import StepContext
from ulysses_infer.model.draft_heads.head import DraftHead
from ulysses_infer.model.hidden_states import HiddenStates
from ulysses_infer.model.sampling.head import global_argmax, local_argmax
from ulysses_infer.native.matmul import NativeMatmul
from ulysses_infer.parallel.groups import ProcessGroups
from ulysses_infer.parallel.layout import Mode, token_spans
from ulysses_infer.worker.attention_inputs import AttentionInputs
from ulysses_infer.worker.block_tables import GroupArrays, StepArrays
from ulysses_infer.worker.drafting.chain_tables import ChainTables, scratch_blocks_per_sequence
from ulysses_infer.worker.drafting.messages import Chain, Follow, decode
from ulysses_infer.worker.next_tokens import NextTokenBuffer
from ulysses_infer.worker.step import Step
from ulysses_infer.worker.step_context import StepContextBuilder, at_least_one, rows_within
from ulysses_infer.worker.step_plan import StepPlan
from ulysses_infer.worker.transfer import DeviceToHostCopy, make_inputs


class _Observed(NamedTuple):
    """The last step of the served model."""

    plan: StepPlan
    arrays: StepArrays
    num_rows: int
    """Its tokens, with padding."""


class _Ends(NamedTuple):
    """Where drafting can go on after the step, for n sequences."""

    positions: np.ndarray  # [n] int64, of the last tokens whose hidden states are known
    sequences: np.ndarray  # [n] int64, rows of the step's block tables
    states: torch.Tensor  # [n, D], of the head, on every rank
    context: StepContext  # in which they were computed
    mode: Mode  # of the step
    tables: GroupArrays  # of the step


class HeadDrafter:
    """Implements `Drafter` with a head.

    The cache has the blocks of the served model's cache, addressed by the same tables, so that a text's keys and values
    of the head are there wherever those of its other layers are. What belongs to position p is computed from the hidden
    state of the token at p and the token at p + 1. After each step the head runs over all of its tokens, in its mode
    and with its slices; the first token is drafted from that, each further one in a step of one token per sequence.
    """

    def __init__(
        self,
        head: DraftHead,
        hidden: HiddenStates,
        cache: PagedCache,
        groups: ProcessGroups,
        backend: AttentionBackend,
        matmul: NativeMatmul | None,
        num_blocks: int,
        max_drafted: int,
    ) -> None:
        """cache: with `num_blocks` blocks of the served model and, behind them, those of `scratch_blocks`."""
        self.head, self.hidden, self.cache, self.groups = head, hidden, cache, groups
        self.device, self._num_blocks = cache.device, num_blocks
        self._contexts = StepContextBuilder(cache, groups, backend, matmul)
        self._inputs, self._tokens = make_inputs(cache.device), NextTokenBuffer(groups.world)
        self._for_kernels = cache.device.type != "cpu" or isinstance(backend, KernelAttention)
        self._scratch = scratch_blocks_per_sequence(cache.shape.block_size, max_drafted)
        self._observed: _Observed | None = None
        self._ends: _Ends | None = None

    def observe(self, step: Step, num_rows: int) -> None:
        """See `StepObserver.observe`."""
        self._observed = _Observed(step.plan, step.arrays, num_rows)

    def run(self, payload: bytes) -> None:
        """See `Drafter.run`. payload: of `messages.py`. Collective."""
        self.draft(payload)

    def draft(self, payload: bytes) -> list[DeviceToHostCopy]:
        """`run` on rank 0. Returns the drafted tokens of a `Chain`, [n] for each place in order."""
        message = decode(payload)
        if isinstance(message, Follow):
            self._follow(message)
            return []
        return self._chain(message)

    def take_caches(self) -> None:
        """See `Drafter.take_caches`."""
        self.cache.take()

    def release_caches(self) -> None:
        """See `Drafter.release_caches`."""
        self.cache.release()
        self._observed = self._ends = None

    def _follow(self, message: Follow) -> None:
        """Run the head over the tokens of the last step, each with the token that follows it."""
        if self._observed is None:  # its cache has been released since
            self._ends = None
            return
        plan, arrays, num_rows = self._observed
        lens = np.array([item.num_tokens for item in plan.items], dtype=np.int64)
        firsts = np.cumsum(lens) - lens
        ends = firsts + np.array(message.rows, dtype=np.int64)
        following = np.roll(plan.token_ids.astype(np.int64), -1)
        following[ends] = message.next_tokens
        rows = ends[message.drafting]
        hidden = self._aligned_hidden(plan, num_rows)
        single = StepArrays(arrays.positions, arrays.query_lens, arrays.groups[:1], arrays.rows)
        states, context = self._run(plan.mode, single, following, hidden, rows)
        sequences = rows if plan.runs_by_row else np.array(message.drafting, dtype=np.int64)
        self._ends = _Ends(arrays.positions[rows], sequences, states, context, plan.mode, single.groups[0])

    def _chain(self, message: Chain) -> list[DeviceToHostCopy]:
        """Draft tokens for some of the sequences at which `_follow` has stopped."""
        ends = self._ends
        if ends is None:
            return []
        picked = np.array(message.picked, dtype=np.int64)
        places = self._num_blocks, self._scratch, self.cache.shape.block_size
        tables = ChainTables.of(ends.tables, ends.sequences[picked], ends.positions[picked], *places)
        on_device, copied = self._inputs.send([picked, tables.copied.T])
        hidden, tokens = self._next(ends.states.index_select(0, on_device), ends.context)
        if message.num_tokens > 1 and len(tables.copied):
            self._copy_blocks(*copied)
        drafted, rows = [tokens], np.arange(len(picked))
        for place in range(message.num_tokens - 1):
            hidden, tokens = self._next(*self._run(ends.mode, tables.arrays(place), tokens, hidden, rows))
            drafted.append(tokens)
        # Rank-divergent: only rank 0 needs them.
        return [DeviceToHostCopy(each) for each in drafted] if self.groups.is_first else []

    def _aligned_hidden(self, plan: StepPlan, num_rows: int) -> torch.Tensor:
        """The hidden states of this rank's slice of the step without padding, [t, F]."""
        spans = token_spans(num_rows, plan.mode.sp)
        own = spans[self.groups.place(plan.mode).token_index]
        kept = self.hidden.of_slice(max(1, own.size))
        if num_rows == plan.num_tokens or plan.mode.sp == 1:
            return kept[: max(1, self._contexts.local_span(plan.mode, plan.num_tokens).size)]
        everything = self.groups.by_mode[plan.mode].gather_rows(kept[: own.size], [span.size for span in spans])
        local = self._contexts.local_span(plan.mode, plan.num_tokens)
        return everything[local.start : local.start + max(1, local.size)]

    def _run(
        self,
        mode: Mode,
        arrays: StepArrays,
        tokens: np.ndarray | torch.Tensor,
        hidden: torch.Tensor,
        rows: np.ndarray,
    ) -> tuple[torch.Tensor, StepContext]:
        """One step of the head.

        tokens: [T], of all ranks; rows: [n], after which to go on. hidden: for tokens on the host, [t, F], what
        this rank has kept of the served model; for drafted ones on the device, [T, D] of all ranks, the head's own
        output. Returns the states of `rows` [n, D], on every rank, and the context.
        """
        count = len(arrays.positions)
        local = self._contexts.local_span(mode, count)
        own = slice(local.start, local.stop)
        attention = AttentionInputs(arrays, self._for_kernels)
        given = at_least_one(tokens[own] if isinstance(tokens, np.ndarray) else np.zeros(0, dtype=np.int64))
        token_ids, positions, own_rows, *sent = self._inputs.send(
            [
                given,
                at_least_one(arrays.positions[own]),
                rows_within(rows, local) - local.start,
                *attention.to_send(),
            ]
        )
        context = self._contexts.build(mode, count, attention.metadata(sent), rows)
        if isinstance(tokens, np.ndarray):
            hidden = self.head.fuse(hidden, context)
        else:
            token_ids, hidden = (each[own] if local.size else each[:1] for each in (tokens, hidden))
        return self.head.draft(token_ids, positions, hidden, own_rows, context), context

    def _next(self, states: torch.Tensor, context: StepContext) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states to go on from, [n, D], and the next tokens, [n], on every rank. states: [n, D]."""
        hidden, logits = self.head.finish(states, context)
        return hidden, self._best(logits, len(states))

    def _best(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """The most probable token of each row, [n], on every rank. logits: [n, V/W]."""
        pairs = self.groups.gather_to_first(local_argmax(logits, self.head.vocabulary))
        self._tokens.share(None if pairs is None else global_argmax(pairs), count, self.device)
        return self.head.module.tokens_of(self._tokens.tokens)

    def _copy_blocks(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy blocks of all layers. source, target: [m]."""
        for keys, values in zip(self.cache.keys, self.cache.values, strict=True):
            for tensor in (keys,) if self.cache.shape.values_in_keys else (keys, values):
                stored = tensor.view(torch.uint8)  # torch does not index all types
                stored[target] = stored[source]
