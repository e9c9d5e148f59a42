"""A step laid out on one rank, and the interface of the ways to run it: eager, CUDA graph, CPU graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ulysses_infer.worker.block_tables import StepArrays
from ulysses_infer.worker.next_tokens import NextTokenBuffer
from ulysses_infer.worker.step_plan import StepPlan

Finish = Callable[[torch.Tensor], torch.Tensor | None]
"""Turns a rank's logits [n, V/W] into the chosen tokens [n] (rank 0; None elsewhere), or returns the logits."""


class Step(NamedTuple):
    """A step plan and what this rank needs to run it."""

    plan: StepPlan
    arrays: StepArrays
    logits_rows: np.ndarray  # [n] int64, positions in the batch whose logits are needed, ascending
    next_tokens: NextTokenBuffer
    head_inputs: list[torch.Tensor] | None = None
    """Where the vocabulary head leaves what it reads, [n, D], if the plan `pools`."""

    def fill_placeholders(self, token_ids: torch.Tensor) -> None:
        """Replace placeholder tokens by the tokens that the previous step chose, in place. token_ids: [t] int64."""
        if self.plan.has_placeholders:
            self.next_tokens.fill_placeholders(token_ids)


class StepRunner(Protocol):
    """One way to run a step."""

    @property
    def is_settled(self) -> bool:
        """Whether the last step took as long as others of its kind will: False if recording it makes these faster."""
        ...

    def accepts(self, plan: StepPlan) -> bool:
        """Whether this runner can run the step."""
        ...

    def num_rows(self, plan: StepPlan) -> int:
        """Tokens of the step as this runner runs it, with padding."""
        ...

    def run(self, step: Step, finish: Finish) -> torch.Tensor | None:
        """Run the forward pass and return `finish(logits)`, valid until the next run. Collective."""
        ...

    def invalidate(self) -> None:
        """Drop everything that refers to the memory of the weights or the cache, because it has moved."""
        ...


class StepProfiler(Protocol):
    """What records a trace of a rank's steps."""

    def annotated(self, plan: StepPlan) -> AbstractContextManager[Any]:
        """The context in which the step runs."""
        ...


class StepObserver(Protocol):
    """What is told of each step that a rank has run."""

    def observe(self, step: Step, num_rows: int) -> None:
        """num_rows: its tokens, with padding, as its runner has run it."""
        ...
