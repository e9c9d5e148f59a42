"""A fake step context to test layers alone: one process plays the ranks of a mode in turn."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from ulysses_infer.model.context import use_step_context


class FakeCollectives:
    """Fakes the all-reduce of the TP group: records each rank's partial result, or returns `total`."""

    def __init__(self, total: torch.Tensor | None = None) -> None:
        self.total = total
        self.partials: list[torch.Tensor] = []

    def sum_over_tp(self, partial: torch.Tensor) -> torch.Tensor:
        self.partials.append(partial.clone())
        return partial if self.total is None else self.total.clone()

    def gather_rows(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return rows


@contextmanager
def step(collectives: Any, **fields: Any) -> Any:
    """Run layers in a step context with `collectives` and the given fields."""
    with use_step_context(
        SimpleNamespace(collectives=collectives, **{"matmul": None, "logits_rows": None, "head_inputs": None, **fields})
    ):  # type: ignore[arg-type]
        yield
