"""Runs steps layer by layer. Works for every step; graphs are a faster way for some of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from ulysses_infer.attention.backend import KernelAttention
from ulysses_infer.model.context import StepContext
from ulysses_infer.model.model import ShiftModel
from ulysses_infer.worker.attention_inputs import AttentionInputs
from ulysses_infer.worker.block_tables import StepArrays
from ulysses_infer.worker.step import Finish, Step
from ulysses_infer.worker.step_context import StepContextBuilder, at_least_one, rows_within
from ulysses_infer.worker.step_plan import StepPlan, adapter_rows
from ulysses_infer.worker.transfer import make_inputs


class EagerRunner:
    """Implements `StepRunner` for any step."""

    def __init__(self, model: ShiftModel, contexts: StepContextBuilder, device: torch.device) -> None:
        self.model, self.contexts, self.device = model, contexts, device
        self.inputs = make_inputs(device)
        self._for_kernels = device.type != "cpu" or isinstance(contexts.backend, KernelAttention)

    @property
    def is_settled(self) -> bool:
        """See `StepRunner.is_settled`."""
        return True

    def accepts(self, plan: StepPlan) -> bool:
        """See `StepRunner.accepts`."""
        return True

    def num_rows(self, plan: StepPlan) -> int:
        """See `StepRunner.num_rows`."""
        return plan.num_tokens

    def run(self, step: Step, finish: Finish) -> torch.Tensor | None:
        """See `StepRunner.run`."""
        plan, arrays, rows = step.plan, step.arrays, step.logits_rows
        parts = [_Part(plan, arrays, rows, self.contexts, self._for_kernels)]
        if self.model.skips_tokens and len(rows) < plan.num_tokens:
            every = np.arange(len(rows))
            parts.append(_Part(plan.narrowed(), arrays.narrowed(rows), every, self.contexts, self._for_kernels))
        sent = iter(self.inputs.send([array for part in parts for array in part.to_send()]))
        token_ids, positions, logits_rows, context = parts[0].received(sent)
        for part in parts[1:]:
            _, own_positions, _, narrowed = part.received(sent)
            narrowed = replace(narrowed, positions=own_positions, head_inputs=step.head_inputs)
            context = replace(context, narrowed=narrowed)
        step.fill_placeholders(token_ids)
        context = replace(context, head_inputs=step.head_inputs)
        return finish(self.model.forward(token_ids, positions, logits_rows, context))

    def invalidate(self) -> None:
        """See `StepRunner.invalidate`. Nothing is kept between steps."""


class _Part:
    """The inputs of a step, or of its tokens that need logits, before and after their transfer to the device."""

    def __init__(
        self,
        plan: StepPlan,
        arrays: StepArrays,
        logits_rows: np.ndarray,
        contexts: StepContextBuilder,
        for_kernels: bool,
    ) -> None:
        self._plan, self._arrays, self._logits_rows, self._contexts = plan, arrays, logits_rows, contexts
        self._attention = AttentionInputs(arrays, for_kernels)
        local = self._local = contexts.local_span(plan.mode, plan.num_tokens)
        self._adapters = adapter_rows(plan.items, local.start, local.stop)

    def to_send(self) -> list[np.ndarray]:
        """The arrays to transfer."""
        local = self._local
        return [
            at_least_one(self._plan.token_ids[local.start : local.stop].astype(np.int64)),
            at_least_one(self._arrays.positions[local.start : local.stop]),
            rows_within(self._logits_rows, local) - local.start,
            self._arrays.rows,
            *self._attention.to_send(),
            *(rows for _, rows in self._adapters),
        ]

    def received(self, sent: Iterator[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, StepContext]:
        """Token ids, positions and logits rows of this rank's slice, and the context; takes `to_send`'s from `sent`."""
        token_ids, positions, logits_rows, slots = (next(sent) for _ in range(4))
        attention = self._attention.metadata([next(sent) for _ in range(self._attention.num_sent)])
        context = self._contexts.build(
            self._plan.mode,
            self._plan.num_tokens,
            attention,
            self._logits_rows,
            [(number, next(sent)) for number, _ in self._adapters],
            slots=slots,
            query_lens=self._arrays.query_lens,
        )
        return token_ids, positions, logits_rows, context
