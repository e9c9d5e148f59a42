"""Weights in eight bits with a scale: for the whole layer, an output channel or a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ulysses_infer.model.quantization.component import Axis, Component, spread
from ulysses_infer.parallel.layout import Span

Grain = Literal["tensor", "channel", "block"]
# Scales of activations: here activations are quantised by their own largest value, token by token, or not at all.
ACTIVATION_SCALES = frozenset(
    ("input_scale", "input_scale_ub", "activation_scale", "input_zero_point", "k_scale", "v_scale", "output_scale")
)


@dataclass(frozen=True)
class ScaledWeight:
    """`weight` [out, in] of float8 or int8, and `scale_name`: [], [out, 1], or one a block, rounded up."""

    scale_name: str
    grain: Grain
    block: tuple[int, int] = (1, 1)
    dtype: torch.dtype = torch.float8_e4m3fn

    @property
    def ignored(self) -> frozenset[str]:
        """See `Scheme`."""
        return ACTIVATION_SCALES

    def components(self, outputs: int, inputs: int) -> dict[str, Component]:
        """See `Scheme`."""
        weight = Component((outputs, inputs), self.dtype, Axis(0), Axis(1))
        return {"weight": weight, self.scale_name: self._scale(outputs, inputs)}

    def _scale(self, outputs: int, inputs: int) -> Component:
        if self.grain == "tensor":
            return Component((), torch.float32)
        if self.grain == "channel":
            return Component((outputs, 1), torch.float32, outputs=Axis(0))
        rows, columns = self.block
        shape = (-(-outputs // rows), -(-inputs // columns))
        return Component(shape, torch.float32, Axis(0, rows), Axis(1, columns))

    def dequantise(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> torch.Tensor:
        """See `Scheme`."""
        scale = parts[self.scale_name]
        if self.grain == "block":
            scale = spread(spread(scale, 0, rows, self.block[0]), 1, columns, self.block[1])
        return parts["weight"].float().mul_(scale)
