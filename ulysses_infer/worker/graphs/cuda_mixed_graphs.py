"""CUDA graphs of steps with prompt tokens: all layers for a fixed number of tokens, attention included.

The attention kernel finds each program's sequence on the device, and programs without work return. So a graph depends
on the number of tokens alone, not on how they are divided over sequences. The output embedding runs after the graph,
on the rows that need logits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch

from ulysses_infer.arithmetic import ceil_div, round_up
from ulysses_infer.attention.backend import AttentionMetadata, HostSequences, KernelSequences, running_sums
from ulysses_infer.cache.paged import PagedCache
from ulysses_infer.errors import ConfigError
from ulysses_infer.model.model import ShiftModel
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.worker.block_tables import GroupArrays
from ulysses_infer.worker.graphs.cuda_graphs import Captured, Capturer, capture_cause
from ulysses_infer.worker.step import Finish, Step
from ulysses_infer.worker.step_context import StepContextBuilder, rows_within
from ulysses_infer.worker.step_plan import StepPlan
from ulysses_infer.worker.transfer import StepInputs

logger = logging.getLogger(__name__)

SMALL_SIZES = (32, 64)
GRANULARITY = 128
"""Sizes of larger graphs are multiples of this number of tokens, so that little is padded."""


def token_sizes(max_tokens: int, sp: int) -> list[int]:
    """Tokens of the captured steps of a mode with `sp` token slices, ascending. All slices have the same size."""
    sizes = [*SMALL_SIZES, *range(GRANULARITY, max_tokens + GRANULARITY, GRANULARITY)]
    return sorted({round_up(min(size, max_tokens), sp) for size in sizes}) if max_tokens else []


class MixedGroupInputs:
    """What the layers of one cache group read in graphs of any size. The last sequence takes the padding tokens."""

    def __init__(self, cache: PagedCache, group: int, num_sequences: int, num_tokens: int, max_model_len: int) -> None:
        """num_sequences: with the padding's; num_tokens: of the largest graph."""
        device, block_size = cache.device, cache.shape.block_size
        self._scratch_block, self._block_size = cache.scratch_block(group), block_size
        span = cache.groups.attention_spans[group]
        blocks = max(span.most_blocks(max_model_len, num_tokens, block_size), ceil_div(num_tokens, block_size))
        self._slots = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self._lens = torch.zeros(3, num_sequences + 1, dtype=torch.int32, device=device)
        shape = num_sequences, blocks
        self._block_tables = torch.full(shape, self._scratch_block, dtype=torch.int32, device=device)
        self._longest = min(max_model_len, blocks * block_size)

    def metadata(self, num_tokens: int) -> AttentionMetadata:
        """Of a graph of `num_tokens` tokens."""
        nothing = np.zeros((0, 0), np.int32)  # these backends do not plan on the host
        sums, contexts, lens = self._lens
        host = HostSequences(nothing.ravel(), nothing.ravel(), nothing)
        sequences = KernelSequences(
            sums, contexts, lens[:-1], self._block_tables, num_tokens, self._longest, host, captured=True
        )
        return AttentionMetadata(self._slots[:num_tokens], [], [], self._block_tables, sequences)

    def to_send(self, group: GroupArrays | None, query_lens: Sequence[int], num_tokens: int) -> list[np.ndarray]:
        """The arrays for `write`, for a graph of `num_tokens` tokens. group: None is a step without sequences."""
        count, used, rows = len(query_lens), sum(query_lens), len(self._block_tables)
        padding = num_tokens - used
        slots = np.full(num_tokens, self._scratch_block * self._block_size, dtype=np.int64)
        queries, contexts = np.zeros((2, rows), dtype=np.int32)
        queries[:count], queries[-1], contexts[-1] = query_lens, padding, padding
        width = max(0 if group is None else group.block_tables.shape[1], ceil_div(padding, self._block_size), 1)
        tables = np.full((rows, width), self._scratch_block, dtype=np.int32)
        if group is not None:
            slots[:used], contexts[:count] = group.slots, group.context_lens
            tables[:count, : group.block_tables.shape[1]] = group.block_tables
        lens = np.zeros((3, rows + 1), dtype=np.int32)
        lens[0], lens[1], lens[2, :-1] = running_sums(queries), running_sums(contexts), contexts
        return [slots, lens, tables]

    def write(self, slots: torch.Tensor, lens: torch.Tensor, block_tables: torch.Tensor) -> None:
        """Copy what was sent into the fixed memory."""
        self._slots[: len(slots)].copy_(slots)
        self._lens.copy_(lens)
        self._block_tables[:, : block_tables.shape[1]].copy_(block_tables)


class MixedGraphRunner:
    """Runs steps of prompt tokens and decodes from CUDA graphs. Implements `StepRunner`."""

    def __init__(
        self,
        model: ShiftModel,
        contexts: StepContextBuilder,
        transfer: StepInputs,
        capturer: Capturer,
        max_num_seqs: int,
        max_tokens: int,
    ) -> None:
        """`model` must have a fused layer loop; the cache must have a scratch block."""
        cache, modes = contexts.cache, contexts.groups.by_mode
        self.model, self._contexts, self._transfer, self._capturer = model, contexts, transfer, capturer
        self.sizes = {mode: token_sizes(max_tokens, mode.sp) for mode in modes}
        self._max_num_seqs, largest = max_num_seqs, max(sizes[-1] for sizes in self.sizes.values())
        self._tokens = torch.zeros(2, largest, dtype=torch.int64, device=cache.device)
        self._hidden = torch.empty(largest, model.shape.hidden_size, dtype=model.dtype, device=cache.device)
        longest = model.shape.max_model_len
        self._inputs = [
            MixedGroupInputs(cache, group, max_num_seqs + 1, largest, longest)
            for group in range(len(cache.groups.attention_spans))
        ]
        all_sizes = {size for sizes in self.sizes.values() for size in sizes}
        self._metadata = {size: [inputs.metadata(size) for inputs in self._inputs] for size in all_sizes}
        self._graphs: dict[tuple[Mode, int], Captured] = {}
        self._weights_version = model.weights_version

    def capture_all(self) -> None:
        """Capture the sizes of every mode, the largest first: the others share its memory. Raises `ConfigError`."""
        for mode, sizes in self.sizes.items():
            started = time.perf_counter()
            for size in reversed(sizes):
                self._capture(mode, size)
            if self._contexts.groups.is_first:
                seconds = time.perf_counter() - started
                logger.info("captured mixed steps of mode %s in %.2f s, of %s tokens", mode, seconds, sizes)

    def invalidate(self) -> None:
        """See `StepRunner.invalidate`. Each step is captured again when it next occurs."""
        self._graphs.clear()
        self._weights_version = self.model.weights_version

    @property
    def is_settled(self) -> bool:
        """See `StepRunner.is_settled`."""
        return True

    def accepts(self, plan: StepPlan) -> bool:
        """Whether the step fits into a graph. Steps with adapters run eagerly: the host decides which rows use them."""
        fits = plan.num_tokens <= self.sizes[plan.mode][-1] and plan.num_sequences <= self._max_num_seqs
        return fits and not plan.pools and not any(item.adapter for item in plan.items)

    def num_rows(self, plan: StepPlan) -> int:
        """See `StepRunner.num_rows`."""
        return next(size for size in self.sizes[plan.mode] if size >= plan.num_tokens)

    def run(self, step: Step, finish: Finish) -> torch.Tensor | None:
        """See `StepRunner.run`."""
        if self.model.weights_version != self._weights_version:
            self.invalidate()
        mode, num_tokens = step.plan.mode, step.plan.num_tokens
        size = self.num_rows(step.plan)
        if (mode, size) not in self._graphs:
            self._capture(mode, size)
        local = self._contexts.local_span(mode, size)
        rows = self._fill(size, step, rows_within(step.logits_rows, local) - local.start)
        step.fill_placeholders(self._tokens[0, :num_tokens])
        self._graphs[mode, size].replay()
        context = self._contexts.build(mode, size, self._metadata[size], step.logits_rows)
        return finish(self.model.logits(self._hidden[: local.size], rows, context))

    def _fill(self, size: int, step: Step | None, rows: np.ndarray) -> torch.Tensor:
        """Write the inputs of a step, None being one without sequences; returns `rows` on the device."""
        tokens = np.zeros((2, size), dtype=np.int64)
        arrays = None if step is None else step.arrays
        if step is not None:
            tokens[:, : step.plan.num_tokens] = step.plan.token_ids, step.arrays.positions
        fields = [rows, tokens]
        for number, inputs in enumerate(self._inputs):
            group, lens = (None, []) if arrays is None else (arrays.groups[number], arrays.query_lens)
            fields += inputs.to_send(group, lens, size)
        sent_rows, sent_tokens, *rest = self._transfer.send(fields)
        self._tokens[:, :size].copy_(sent_tokens)
        for number, inputs in enumerate(self._inputs):
            inputs.write(*rest[3 * number : 3 * number + 3])
        return sent_rows

    def _capture(self, mode: Mode, size: int) -> None:
        self._fill(size, None, np.zeros(0, dtype=np.int64))
        context = self._contexts.build(mode, size, self._metadata[size], is_captured=True)
        local = self._contexts.local_span(mode, size)
        token_ids, positions = self._tokens[:, local.start : local.stop]

        def run_step() -> None:
            self._hidden[: local.size].copy_(self.model.hidden(token_ids, positions, context))

        try:
            self._graphs[mode, size] = self._capturer.capture(run_step)
        except RuntimeError as error:
            cause = capture_cause(error, run_step, self._contexts.groups, self._tokens.device)
            raise ConfigError(
                f"a step of {size} tokens in mode {mode} cannot be captured ({cause}); "
                "set runtime.max_captured_tokens=0"
            ) from error
