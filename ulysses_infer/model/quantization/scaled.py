"""Eight-bit weights with scales per tensor, per output channel or per block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.kernels.experts_weights import StoredExperts
from ulysses_infer.model.quantization.component import Axis, Component, spread
from ulysses_infer.parallel.layout import Span

Grain = Literal["tensor", "channel", "block"]
# Activation scales are ignored: activations are quantized dynamically per token, or not at all.
ACTIVATION_SCALES = frozenset(
    ("input_scale", "input_scale_ub", "activation_scale", "input_zero_point", "k_scale", "v_scale", "output_scale")
)

E4M3_AS_BFLOAT16 = 2.0**-120  # value of the bits of an e4m3 number, read as a bfloat16, relative to the number


def widened(weight: torch.Tensor) -> torch.Tensor:
    """float8 or int8 as float32, in new memory. On a CPU this works on whole registers; torch casts value by value."""
    if weight.device.type != "cpu" or weight.dtype != torch.float8_e4m3fn:
        return weight.float()
    bits = weight.view(torch.int8).to(torch.int16)  # the sign bit and the rest, moved to a bfloat16's places
    values = ((bits & 0x7F) << 4).bitwise_or_(bits & -0x8000).view(torch.bfloat16)
    return values.mul_(1 / E4M3_AS_BFLOAT16).float()


@dataclass(frozen=True)
class ScaledWeight:
    """`weight` [out, in] of float8 or int8, and `scale_name`: [], [out, 1], or one per block, rounded up."""

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
        shape = (ceil_div(outputs, rows), ceil_div(inputs, columns))
        return Component(shape, torch.float32, Axis(0, rows), Axis(1, columns))

    def dequantise(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> torch.Tensor:
        """See `Scheme`."""
        scale = parts[self.scale_name]
        if self.grain == "block":
            scale = spread(spread(scale, 0, rows, self.block[0]), 1, columns, self.block[1])
        return widened(parts["weight"]).mul_(scale)

    def stored_experts(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> StoredExperts:
        """See `Scheme`."""
        weight, scale = parts["weight"], parts[self.scale_name]
        steps = self.block if self.grain == "block" else (1, 0)
        return StoredExperts(
            weight,
            rows.size,
            columns.size,
            rows.start,
            columns.start,
            scales=scale.view(-1, 1, 1) if self.grain == "tensor" else scale,
            scale_outputs=steps[0],
            group_size=steps[1],
        )


@dataclass(frozen=True)
class TransposedScaledWeight:
    """`weight` [in, out] of float8 and `weight_scale` [1, out], as for llama4's experts."""

    @property
    def ignored(self) -> frozenset[str]:
        """See `Scheme`."""
        return ACTIVATION_SCALES

    def components(self, outputs: int, inputs: int) -> dict[str, Component]:
        """See `Scheme`."""
        return {
            "weight": Component((inputs, outputs), torch.float8_e4m3fn, outputs=Axis(1), inputs=Axis(0)),
            "weight_scale": Component((1, outputs), torch.float32, outputs=Axis(1)),
        }

    def dequantise(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> torch.Tensor:
        """See `Scheme`."""
        return widened(parts["weight"]).mul_(parts["weight_scale"]).t()

    def stored_experts(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> StoredExperts:
        """See `Scheme`."""
        weight, scale = (parts[name].transpose(1, 2) for name in ("weight", "weight_scale"))
        return StoredExperts(weight, rows.size, columns.size, rows.start, columns.start, scales=scale)
