"""Fused computation of rotary cosines and sines."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.model.fusion.elementwise import Elementwise
from ulysses_infer.model.fusion.equivalence import MISMATCH_ERRORS, is_close

NUM_TEST_POSITIONS = 64
"""Number of positions tested, from 0 to the last possible one."""


class FusedRotary(nn.Module):
    """Scaled cosine and sine of position times frequency, for every rotary embedding with fixed frequencies.

    Reads the frequencies of `source`; has no weights.
    """

    def __init__(self, source: Any, elementwise: Elementwise) -> None:
        super().__init__()
        self._source, self._elementwise = [source], elementwise  # in a list, so that it is not registered twice

    @staticmethod
    def candidate(source: Any) -> bool:
        """Whether `source` has the attributes of such an embedding."""
        frequencies = getattr(source, "inv_freq", None)
        return (
            isinstance(frequencies, torch.Tensor)
            and frequencies.dim() == 1
            and frequencies.dtype == torch.float32
            and isinstance(getattr(source, "attention_scaling", None), float | int)
        )

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [1, t, D], which sets dtype and device; position_ids: [1, t] int64; returns two of [1, t, r]."""
        (source,) = self._source
        cosine, sine = self._elementwise.rotary(position_ids[0], source.inv_freq, float(source.attention_scaling))
        return cosine[None], sine[None]

    @torch.inference_mode()
    def is_equal(self, hidden: torch.Tensor, last_position: int) -> bool:
        """Whether it computes the same as `source` up to `last_position`. hidden: any [1, 1, D]."""
        (source,) = self._source
        positions = torch.linspace(
            0, last_position, NUM_TEST_POSITIONS, dtype=torch.float64, device=hidden.device
        ).long()[None]
        try:
            pairs = zip(self(hidden, positions), source(hidden, positions), strict=True)
            return all(is_close(found, expected) for found, expected in pairs)
        except MISMATCH_ERRORS:
            return False
