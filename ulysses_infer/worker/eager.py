"""Runs steps layer by layer. Works for every step; graphs are a faster way for some of them."""

from __future__ import annotations

import numpy as np
import torch

from ulysses_infer.attention.backend import KernelAttention
from ulysses_infer.model.model import ShiftModel
from ulysses_infer.worker.attention_inputs import AttentionInputs
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

    def accepts(self, plan: StepPlan) -> bool:
        """See `StepRunner.accepts`."""
        return True

    def num_rows(self, plan: StepPlan) -> int:
        """See `StepRunner.num_rows`."""
        return plan.num_tokens

    def run(self, step: Step, finish: Finish) -> torch.Tensor | None:
        """See `StepRunner.run`."""
        plan, arrays = step.plan, step.arrays
        local = self.contexts.local_span(plan.mode, plan.num_tokens)
        attention_inputs = AttentionInputs(arrays, self._for_kernels)
        adapters = adapter_rows(plan.items, local.start, local.stop)
        token_ids, positions, logits_rows, slots, *sent = self.inputs.send(
            [
                at_least_one(plan.token_ids[local.start : local.stop].astype(np.int64)),
                at_least_one(arrays.positions[local.start : local.stop]),
                rows_within(step.logits_rows, local) - local.start,
                arrays.rows,
                *attention_inputs.to_send(),
                *(rows for _, rows in adapters),
            ]
        )
        step.fill_placeholders(token_ids)
        first = len(sent) - len(adapters)
        attention = attention_inputs.metadata(sent[:first])
        of_adapters = [(number, rows) for (number, _), rows in zip(adapters, sent[first:], strict=True)]
        context = self.contexts.build(
            plan.mode,
            plan.num_tokens,
            attention,
            step.logits_rows,
            of_adapters,
            slots=slots,
            query_lens=arrays.query_lens,
        )
        return finish(self.model.forward(token_ids, positions, logits_rows, context))

    def invalidate(self) -> None:
        """See `StepRunner.invalidate`. Nothing is kept between steps."""
