"""Rows of tokens in the order of their experts. Does not need Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SortedRows:
    """A row per choice, those of one expert after another's; the last are of experts that other ranks own."""

    offsets: torch.Tensor
    """[own experts + 1] int32: where the rows of each end, and their number."""
    tokens: torch.Tensor
    """[t * K] int64: the token of each row."""
    rows: torch.Tensor
    """[t * K] int32: the row of each choice; -1 if another rank owns its expert."""

    @property
    def ends(self) -> torch.Tensor:
        """[own experts] int32: where the rows of each end."""
        return self.offsets[:-1]

    @staticmethod
    def empty(experts: torch.Tensor, own: int) -> SortedRows:
        """Memory for the rows of choices [t, K] among `own` experts, where the choices are."""
        choices = experts.numel()
        return SortedRows(
            experts.new_empty(own + 1, dtype=torch.int32),
            experts.new_empty(choices, dtype=torch.int64),
            experts.new_empty(choices, dtype=torch.int32),
        )
