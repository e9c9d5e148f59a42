"""CUDA graphs: decode steps captured once per mode and bucket of rows, with their collectives, and replayed.

A captured step reads only fixed memory (`static_inputs.py`): a step's inputs are written there, padded up to the
bucket, and one call replays the whole step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import torch

from ulysses_infer.arithmetic import round_up
from ulysses_infer.attention.backend import KernelAttention
from ulysses_infer.cache.paged import PagedCache
from ulysses_infer.cache.states import StateCache
from ulysses_infer.errors import ConfigError, first_line
from ulysses_infer.model.model import ShiftModel
from ulysses_infer.parallel.groups import ProcessGroups
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.worker.graphs.capture_checker import CaptureError, find_cause
from ulysses_infer.worker.graphs.static_inputs import CudaGroupInputs, CudaInputs
from ulysses_infer.worker.step import Finish, Step
from ulysses_infer.worker.step_context import StepContextBuilder
from ulysses_infer.worker.step_plan import StepPlan
from ulysses_infer.worker.transfer import StepInputs

logger = logging.getLogger(__name__)

MAX_ROWS = 1024  # larger steps are long enough to hide their kernel launches


class Captured(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Run it again on the current contents of its inputs."""
        ...


class Capturer(Protocol):
    """Captures steps."""

    def capture(self, step: Callable[[], None]) -> Captured:
        """Capture `step`, which must do the same work on the same memory at every call."""
        ...


class CudaCapturer:
    """Captures CUDA graphs that share one memory pool: they never run at the same time, and none reads what another
    left there."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, step: Callable[[], None]) -> Captured:
        """See `Capturer.capture`. Runs the step once before, because libraries initialise in their first call."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # This thread only: NCCL's watchdog thread queries events, which would invalidate a global capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return graph


def bucket_sizes(max_rows: int, sp: int) -> list[int]:
    """Rows of the captured steps of a mode with `sp` token slices, ascending. All slices have the same size.

    1, 2, 4, 8, 16, then each power of two and the number half-way to the next: above 16 rows, at most half of
    the rows of a step are added as padding.
    """
    limit = min(max_rows, MAX_ROWS)
    sizes = [1, 2, 4, 8, 16]
    while sizes[-1] < limit:
        sizes += [sizes[-1] * 3 // 2, sizes[-1] * 2]
    return sorted({round_up(min(size, limit), sp) for size in sizes})


def capture_cause(error: RuntimeError, step: Callable[[], None], groups: ProcessGroups, device: torch.device) -> str:
    """Why `step` could not be captured: the operator, where the ranks can run the step again to find it."""
    alone = groups.layout.world_size == 1 and not isinstance(error, torch.cuda.OutOfMemoryError)
    found = find_cause(step, device) if alone and not isinstance(error, CaptureError) else None
    return found or first_line(error)


class CudaGraphRunner:
    """Runs decode steps of one rank from CUDA graphs. Implements `StepRunner`. All ranks capture the same steps."""

    def __init__(
        self,
        model: ShiftModel,
        cache: PagedCache,
        groups: ProcessGroups,
        backend: KernelAttention,
        transfer: StepInputs,
        capturer: Capturer,
        device: torch.device,
        max_rows: int,
        states: StateCache | None = None,
    ) -> None:
        """`cache` must have a scratch block, `states` a scratch slot. max_rows: of a step, with drafted tokens."""
        self.model, self.cache, self.groups, self.backend = model, cache, groups, backend
        self._contexts = StepContextBuilder(cache, groups, backend, states=states)
        self._scratch_slot = 0 if states is None else states.scratch_slot
        self._transfer, self._capturer = transfer, capturer
        self.buckets = {mode: bucket_sizes(max_rows, mode.sp) for mode in groups.by_mode}
        largest = max(sizes[-1] for sizes in self.buckets.values())
        self._block_tables = [
            torch.full((largest, self._max_blocks(group)), cache.scratch_block(group), dtype=torch.int32, device=device)
            for group in range(len(cache.groups.attention_spans))
        ]
        self._rows = torch.arange(largest, device=device)
        self._logits = torch.empty(0, device=device)
        self._inputs: dict[int, CudaInputs] = {}
        self._graphs: dict[tuple[Mode, int], Captured] = {}
        self._weights_version = model.weights_version

    def capture_all(self) -> None:
        """Capture the buckets of every mode, the largest first: the others share its memory. Raises `ConfigError`."""
        for mode, sizes in self.buckets.items():
            started, taken = time.perf_counter(), self._reserved_bytes()
            for size in reversed(sizes):
                self._capture(mode, size)
            seconds, mebibytes = time.perf_counter() - started, (self._reserved_bytes() - taken) >> 20
            if self.groups.is_first:
                logger.info(
                    "captured decode steps of mode %s in %.2f s and %d MiB, of %s rows", mode, seconds, mebibytes, sizes
                )

    def invalidate(self) -> None:
        """See `StepRunner.invalidate`. Each step is captured again when it next occurs."""
        self._graphs.clear()
        self._weights_version = self.model.weights_version

    @property
    def is_settled(self) -> bool:
        """See `StepRunner.is_settled`."""
        return True

    def accepts(self, plan: StepPlan) -> bool:
        """Whether the step has only decodes and fits into a bucket.

        Steps with adapters run eagerly: the host decides which rows go through which adapter.
        """
        if plan.pools or not plan.runs_by_row or any(item.adapter for item in plan.items):
            return False
        return plan.num_tokens <= self.buckets[plan.mode][-1]

    def num_rows(self, plan: StepPlan) -> int:
        """See `StepRunner.num_rows`."""
        return next(size for size in self.buckets[plan.mode] if size >= plan.num_tokens)

    def run(self, step: Step, finish: Finish) -> torch.Tensor | None:
        """See `StepRunner.run`."""
        if self.model.weights_version != self._weights_version:
            self.invalidate()
        mode, num_tokens = step.plan.mode, step.plan.num_tokens
        size = self.num_rows(step.plan)
        if (mode, size) not in self._graphs:
            self._capture(mode, size)
        inputs = self._inputs[size]
        hosts = inputs.fill(step, self.cache.shape.block_size, self._transfer)
        step.fill_placeholders(inputs.token_ids)
        for group, host in zip(inputs.groups, hosts, strict=True):
            self.backend.replan(group.sequences, host)
        self._graphs[mode, size].replay()
        logits = self._logits[:num_tokens]
        if len(step.logits_rows) < num_tokens:
            logits = logits[self._transfer.send([step.logits_rows])[0]]
        return finish(logits)

    def _max_blocks(self, cache_group: int) -> int:
        """The most blocks that a decode reads of a cache group; a table may start one block earlier."""
        attention_span, shape = self.cache.groups.attention_spans[cache_group], self.cache.shape
        return attention_span.most_blocks(self.model.shape.max_model_len, 1, shape.block_size)

    def _make_inputs(self, size: int) -> CudaInputs:
        groups = []
        for group, tables in enumerate(self._block_tables):
            longest = min(self.model.shape.max_model_len, tables.shape[1] * self.cache.shape.block_size)
            groups.append(CudaGroupInputs(size, tables[:size], longest, self.cache.scratch_block(group)))
        return CudaInputs(size, groups, self._rows.device, self._scratch_slot)

    def _reserved_bytes(self) -> int:
        """GPU memory that torch has reserved."""
        device = self._rows.device
        return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0

    def _capture(self, mode: Mode, size: int) -> None:
        if size not in self._inputs:
            self._inputs[size] = self._make_inputs(size)
        inputs = self._inputs[size]
        inputs.fill(None, self.cache.shape.block_size, self._transfer)
        metadata = [group.metadata for group in inputs.groups]
        context = self._contexts.build(
            mode, size, metadata, is_captured=True, slots=inputs.slots, query_lens=[1] * size
        )
        local = self._contexts.local_span(mode, size)
        token_ids, positions = inputs.token_ids[local.start : local.stop], inputs.positions[local.start : local.stop]
        rows = self._rows[: local.size]

        def run_step() -> None:
            self._keep(self.model.forward(token_ids, positions, rows, context))

        try:
            self._graphs[mode, size] = self._capturer.capture(run_step)
        except RuntimeError as error:
            cause = capture_cause(error, run_step, self.groups, self._rows.device)
            raise ConfigError(
                f"a decode step of {size} rows in mode {mode} cannot be captured ({cause}); "
                "set runtime.enforce_eager=true"
            ) from error

    def _keep(self, logits: torch.Tensor) -> None:
        """Copy logits out of the graphs' shared memory, which the next graph overwrites."""
        if self._logits.shape[1:] != logits.shape[1:]:
            # Only in the very first call, which is not captured: a capturer runs each step once before.
            self._logits = logits.new_empty(len(self._rows), logits.shape[1])
        self._logits[: logits.shape[0]].copy_(logits)


def wants_cuda_graphs(enforce_eager: bool | None, device: torch.device, backend: object, host_reads: str = "") -> bool:
    """Whether to capture decode steps. enforce_eager: None captures where nothing prevents it.

    host_reads: why steps, of any mode, would wait for values on the device; "": they would not.
    Raises `ConfigError` if enforce_eager is False and steps cannot be captured.
    """
    if enforce_eager or device.type == "cpu":  # CPU graphs are in cpu_graphs.py
        return False
    reason = host_reads
    if not isinstance(backend, KernelAttention):
        reason = f"attention runs on {getattr(backend, 'name', '?')}"
    if reason and enforce_eager is not None:
        raise ConfigError(
            f"runtime.enforce_eager is false, but {reason}, so that steps cannot be captured; use null, or another "
            "runtime.attention_backend"
        )
    if reason:
        logger.info("decode steps of all modes are not captured: %s", reason)
    return not reason
