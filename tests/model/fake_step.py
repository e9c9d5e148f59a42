"""A step context for layers on their own: one process plays one rank of a mode after another."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from ulysses_infer.model.context import use_step_context


class FakeCollectives:
    """Stands in for the TP group's sum: remembers each rank's partial result, or gives the sum of all."""

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
    """Run layers inside a step that knows `collectives` and whatever else is given."""
    with use_step_context(SimpleNamespace(collectives=collectives, **{"matmul": None, **fields})):  # type: ignore[arg-type]
        yield
