"""Decode steps captured in CUDA graphs, one a mode and bucket of rows, their collectives included.

A captured step reads nothing but fixed memory: its inputs are written there, with padding up to the bucket, and then
the whole step is replayed in one call. Padding rows are sequences of one token in a scratch block of the cache.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from ulysses_infer.attention.backend import (
    AttentionMetadata,
    HostSequences,
    KernelAttention,
    KernelSequences,
    running_sums,
)
from ulysses_infer.cache.paged import PagedCache
from ulysses_infer.errors import ConfigError, first_line
from ulysses_infer.model.context import StepContext
from ulysses_infer.model.model import ShiftModel
from ulysses_infer.parallel.groups import Groups
from ulysses_infer.parallel.layout import Mode, token_spans
from ulysses_infer.worker.block_tables import GroupArrays, StepArrays
from ulysses_infer.worker.next_tokens import NextTokenBuffer
from ulysses_infer.worker.step_plan import StepPlan
from ulysses_infer.worker.transfer import StepInputs

logger = logging.getLogger(__name__)

Finish = Callable[[torch.Tensor], torch.Tensor | None]
"""What is made of a step's logits [n, V/W] on its rank: the tokens, on rank 0, or the logits themselves."""

LARGEST = 512  # rows; larger steps are long enough to hide their launches


class Captured(Protocol):
    """A step that was recorded."""

    def replay(self) -> None:
        """Do it again, on what its inputs hold now."""
        ...


class Capturer(Protocol):
    """How steps are recorded."""

    def capture(self, step: Callable[[], None]) -> Captured:
        """Record `step`, which must do the same to the same memory whenever it is called."""
        ...


class CudaCapturer:
    """Records CUDA graphs. All share one memory pool: none is replayed while another runs, and none reads what
    another left there."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, step: Callable[[], None]) -> Captured:
        """See `Capturer.capture`. Runs the step once beforehand: libraries set themselves up in their first call."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: NCCL's watchdog queries events in its own, which would spoil a global capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return graph


class Repeater:
    """Stands for CUDA graphs on a CPU, in tests: a replay is the recorded call, made again."""

    class _Recorded:
        def __init__(self, step: Callable[[], None]) -> None:
            self.replay = step

    def capture(self, step: Callable[[], None]) -> Captured:
        """See `Capturer.capture`."""
        step()
        return Repeater._Recorded(step)


def bucket_sizes(max_num_seqs: int, sp: int) -> list[int]:
    """Rows of the captured steps of a mode with `sp` token slices, ascending; every slice has the same, at least one.

    1, 2, 4, 8, 16, then each power of two and the number half-way to the next: no step above 16 rows is padded by
    more than half of it.
    """
    limit = min(max_num_seqs, LARGEST)
    plain = [1, 2, 4, 8, 16]
    while plain[-1] < limit:
        plain += [plain[-1] * 3 // 2, plain[-1] * 2]
    sizes = {min(size, limit) for size in plain}
    return sorted({-(-size // sp) * sp for size in sizes})


class StaticGroup:
    """What the layers of one cache group read in captured steps of `size` rows."""

    def __init__(self, size: int, block_tables: torch.Tensor, max_context_len: int, scratch_block: int) -> None:
        """block_tables: [size, blocks of the longest sequence] int32, which may be part of a larger bucket's."""
        device = block_tables.device
        self.size, self._scratch_block = size, scratch_block
        self._slots = torch.zeros(size, dtype=torch.int64, device=device)
        self._lens = torch.zeros(2, size + 1, dtype=torch.int32, device=device)  # running sums, lengths and a spare
        self._block_tables = block_tables
        self._padding = HostSequences(
            np.ones(size, np.int32), np.ones(size, np.int32), np.full((size, 1), scratch_block, np.int32)
        )
        starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.sequences = KernelSequences(
            starts, self._lens[0], self._lens[1, :size], block_tables, 1, max_context_len, self._padding, captured=True
        )
        # Lists are for backends that are not captured; one that read them would find no sequence at all.
        self.metadata = AttentionMetadata(self._slots, [], [], block_tables, self.sequences)

    def to_send(self, group: GroupArrays | None, block_size: int) -> tuple[HostSequences, list[np.ndarray]]:
        """The sequences of a step, None for none, padding included, and the arrays that `take` takes."""
        slots = np.full(self.size, self._scratch_block * block_size, dtype=np.int64)
        host = self._padding
        if group is not None:
            slots[: len(group.slots)] = group.slots
            host = self._padded(group)
        lens = np.zeros((2, self.size + 1), dtype=np.int32)
        lens[0], lens[1, : self.size] = running_sums(host.context_lens), host.context_lens
        return host, [slots, lens, host.block_tables]

    def take(self, slots: torch.Tensor, lens: torch.Tensor, block_tables: torch.Tensor) -> None:
        """Keep what was sent."""
        self._slots.copy_(slots)
        self._lens.copy_(lens)
        # What is further right is of other steps: no length attention_spans it.
        self._block_tables[:, : block_tables.shape[1]].copy_(block_tables)

    def _padded(self, group: GroupArrays) -> HostSequences:
        count, width = group.block_tables.shape
        contexts = np.ones(self.size, dtype=np.int32)
        contexts[:count] = group.context_lens
        tables = np.full((self.size, width), self._scratch_block, dtype=np.int32)
        tables[:count] = group.block_tables
        return HostSequences(self._padding.query_lens, contexts, tables)


class StaticInputs:
    """The fixed memory that captured steps of `size` rows read, in every mode."""

    def __init__(self, size: int, groups: Sequence[StaticGroup], device: torch.device) -> None:
        self.size, self.groups = size, list(groups)
        self._tokens = torch.zeros(2, size, dtype=torch.int64, device=device)
        self.token_ids, self.positions = self._tokens

    def fill(
        self, step: tuple[StepPlan, StepArrays] | None, block_size: int, inputs: StepInputs
    ) -> list[HostSequences]:
        """Write a step of at most `size` rows, None for none, and padding; returns its sequences, padding included."""
        tokens = np.zeros((2, self.size), dtype=np.int64)
        arrays: Sequence[GroupArrays | None] = [None] * len(self.groups)
        if step is not None:
            plan, laid_out = step
            tokens[:, : plan.num_tokens] = plan.token_ids, laid_out.positions
            arrays = laid_out.groups
        hosts, fields = [], [tokens]
        for group, own in zip(self.groups, arrays, strict=True):
            host, sent = group.to_send(own, block_size)
            hosts.append(host)
            fields += sent
        sent_tokens, *rest = inputs.send(fields)
        self._tokens.copy_(sent_tokens)
        for number, group in enumerate(self.groups):
            group.take(*rest[3 * number : 3 * number + 3])
        return hosts


class CudaGraphRunner:
    """Runs the decode steps of one rank from graphs. Collective where the model is: all ranks capture alike."""

    def __init__(
        self,
        model: ShiftModel,
        cache: PagedCache,
        groups: Groups,
        backend: KernelAttention,
        inputs: StepInputs,
        capturer: Capturer,
        device: torch.device,
        max_num_seqs: int,
    ) -> None:
        """`cache` must have a scratch block; `backend` must read nothing but `AttentionMetadata.kernel`."""
        self.model, self.cache, self.groups, self.backend = model, cache, groups, backend
        self._inputs, self._capturer = inputs, capturer
        self.buckets = {mode: bucket_sizes(max_num_seqs, mode.sp) for mode in groups.by_mode}
        largest = max(sizes[-1] for sizes in self.buckets.values())
        self._block_tables = [
            torch.full((largest, self._width(group)), cache.scratch_block(group), dtype=torch.int32, device=device)
            for group in range(len(cache.groups.attention_spans))
        ]
        self._rows = torch.arange(largest, device=device)
        self._logits = torch.empty(0, device=device)
        self._static: dict[int, StaticInputs] = {}
        self._graphs: dict[tuple[Mode, int], Captured] = {}
        self._weights_version = model.weights_version

    def capture_all(self) -> None:
        """Capture every mode's buckets, the largest first, whose memory the others then share. Raises `ConfigError`."""
        for mode, sizes in self.buckets.items():
            started, taken = time.perf_counter(), self._reserved()
            for size in reversed(sizes):
                self._capture(mode, size)
            seconds, mebibytes = time.perf_counter() - started, (self._reserved() - taken) >> 20
            if self.groups.is_first:
                logger.info(
                    "captured decode steps of mode %s in %.2f s and %d MiB, of %s rows", mode, seconds, mebibytes, sizes
                )

    def forget(self) -> None:
        """The cache or the weights have moved: each graph is captured again when it is next needed."""
        self._graphs.clear()
        self._weights_version = self.model.weights_version

    def bucket(self, plan: StepPlan) -> int | None:
        """The smallest bucket that `plan` fits into; None unless it has one token a sequence and is small enough.

        Steps with adapters are run layer by layer: which rows go through which is decided on the host.
        """
        if plan.num_tokens != len(plan.items) or any(item.adapter for item in plan.items):
            return None
        return next((size for size in self.buckets[plan.mode] if size >= plan.num_tokens), None)

    def run(
        self,
        plan: StepPlan,
        arrays: StepArrays,
        rows: np.ndarray,
        size: int,
        next_tokens: NextTokenBuffer,
        finish: Finish,
    ) -> torch.Tensor | None:
        """Run `plan` in the bucket of `size` rows; returns what `finish` makes of the logits of `rows`.

        Those are valid until the next run.
        """
        if self.model.weights_version != self._weights_version:
            self.forget()
        if (plan.mode, size) not in self._graphs:
            self._capture(plan.mode, size)
        static = self._static[size]
        hosts = static.fill((plan, arrays), self.cache.shape.block_size, self._inputs)
        if plan.has_placeholders:
            next_tokens.fill_placeholders(static.token_ids)
        for group, host in zip(static.groups, hosts, strict=True):
            self.backend.replan(group.sequences, host)
        self._graphs[plan.mode, size].replay()
        logits = self._logits[: plan.num_tokens]
        return finish(logits if len(rows) == plan.num_tokens else logits[torch.from_numpy(rows).to(logits.device)])

    def _width(self, group: int) -> int:
        """The most blocks that a decode reads of a group: a table may begin a block before the first of them."""
        attention_span, shape = self.cache.groups.attention_spans[group], self.cache.shape
        return attention_span.most_blocks(self.model.shape.max_model_len, 1, shape.block_size)

    def _make_static(self, size: int) -> StaticInputs:
        groups = []
        for group, tables in enumerate(self._block_tables):
            longest = min(self.model.shape.max_model_len, tables.shape[1] * self.cache.shape.block_size)
            groups.append(StaticGroup(size, tables[:size], longest, self.cache.scratch_block(group)))
        return StaticInputs(size, groups, self._rows.device)

    def _reserved(self) -> int:
        """Bytes that torch has taken of the GPU's memory."""
        device = self._rows.device
        return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0

    def _capture(self, mode: Mode, size: int) -> None:
        if size not in self._static:
            self._static[size] = self._make_static(size)
        static = self._static[size]
        static.fill(None, self.cache.shape.block_size, self._inputs)
        context = self._context(mode, static)
        mine = context.token_spans[context.collectives.place.token_index]
        token_ids, positions = static.token_ids[mine.start : mine.stop], static.positions[mine.start : mine.stop]
        rows = self._rows[: mine.size]

        def step() -> None:
            logits = self.model.forward(token_ids, positions, rows, context)
            self._take(logits)

        try:
            self._graphs[mode, size] = self._capturer.capture(step)
        except RuntimeError as error:
            raise ConfigError(
                f"a decode step of {size} rows in mode {mode} cannot be captured ({first_line(error)}); "
                "set runtime.enforce_eager=true"
            ) from error

    def _take(self, logits: torch.Tensor) -> None:
        """Copy a step's logits out of the graphs' memory, which the next graph overwrites."""
        if self._logits.shape[1:] != logits.shape[1:]:
            # Only in the first call of all, which is not recorded: a capturer runs each step once beforehand.
            self._logits = logits.new_empty(len(self._rows), logits.shape[1])
        self._logits[: logits.shape[0]].copy_(logits)

    def _context(self, mode: Mode, static: StaticInputs) -> StepContext:
        spans, attention = token_spans(static.size, mode.sp), [group.metadata for group in static.groups]
        return StepContext(
            collectives=self.groups.by_mode[mode],
            token_spans=spans,
            logits_counts=[span.size for span in spans],
            attention=attention[0],
            cache=self.cache,
            backend=self.backend,
            attention_of_layers=self.cache.groups.each_layer(attention),
        )


def wants_cuda_graphs(enforce_eager: bool | None, device: torch.device, backend: object, has_experts: bool) -> bool:
    """Whether decode steps are to be captured; `enforce_eager` None: where nothing speaks against it.

    Raises `ConfigError` when they are to be, and attention cannot.
    """
    if enforce_eager:
        return False
    if device.type == "cpu":
        return False  # it has no graphs, but graphs: see graphs.py
    name = getattr(backend, "name", "?")
    if not isinstance(backend, KernelAttention):
        if enforce_eager is not None:
            raise ConfigError(
                f"runtime.enforce_eager is false, but attention runs on {name}, whose steps cannot be captured; "
                "use null, or another runtime.attention_backend"
            )
        logger.info("decode steps are not captured: attention runs on %s", name)
        return False
    if has_experts and enforce_eager is None:
        logger.info("decode steps are not captured: experts may be sent tokens by counts that only the host knows")
        return False
    return True
