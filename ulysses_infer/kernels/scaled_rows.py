"""Rows that are quantised to FP8, as matrix products read them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

GROUP = 128
"""Values per scale of group quantisation."""
NONE, ROW, GROUPED = 0, 1, 2
"""Kinds of quantisation: none, one scale per row, one per group of a row."""
ALIGNED_ROWS = 4
"""Group-quantised rows are padded to a multiple of this number, as block-scaled products need."""


@dataclass(frozen=True)
class QuantisedRows:
    """A quantised tensor of `shape` [..., K] and `dtype`.

    By row: values [rows, K], scales [rows, 1]. By group: values [padded rows, K] and scales [padded rows, K / 128],
    column-major; the padding is undefined.
    """

    values: torch.Tensor
    scales: torch.Tensor
    kind: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        """Rows without padding."""
        return self.shape[:-1].numel()

    def flat(self) -> QuantisedRows:
        """The same in two dimensions, [rows, K]."""
        return replace(self, shape=torch.Size((self.num_rows, self.shape[-1])))
