"""Weights of four bits in words, with zero points that are not integers: `scale * (code - zero)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.kernels.experts_weights import StoredExperts
from ulysses_infer.model.quantization.component import Axis, Component, spread
from ulysses_infer.model.quantization.group_fit import STORED
from ulysses_infer.model.quantization.packed import CompressedWeight, unpack
from ulysses_infer.parallel.layout import Span


@dataclass(frozen=True)
class FloatZeroWeight:
    """compressed-tensors' `weight_packed` [out, in / 8], and [out, in / group] of bfloat16: `weight_scale`,
    `weight_zero_point`."""

    group_size: int

    @property
    def ignored(self) -> frozenset[str]:
        """See `Scheme`."""
        return frozenset()

    def components(self, outputs: int, inputs: int) -> dict[str, Component]:
        """See `Scheme`."""
        shape = outputs, ceil_div(inputs, self.group_size)
        of_groups = Component(shape, STORED, Axis(0), Axis(1, self.group_size))
        packed = CompressedWeight(self.group_size).components(outputs, inputs)["weight_packed"]
        return {"weight_packed": packed, "weight_scale": of_groups, "weight_zero_point": of_groups}

    def dequantise(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> torch.Tensor:
        """See `Scheme`."""
        codes = unpack(parts["weight_packed"], 1, 4).narrow(1, columns.start % 8, columns.size)
        scales, zeros = (
            spread(parts[name].float(), 1, columns, self.group_size) for name in ("weight_scale", "weight_zero_point")
        )
        return codes.float().sub_(zeros).mul_(scales)

    def stored_experts(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> StoredExperts:
        """See `Scheme`."""
        symmetric = CompressedWeight(self.group_size).stored_experts(parts, rows, columns)
        return replace(symmetric, zeros=parts["weight_zero_point"], zero=0)
