"""Products of all experts at once: torch's kernels where they serve, else the Triton kernel over what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from ulysses_infer.kernels.experts_weights import StoredExperts
from ulysses_infer.kernels.launch import capability
from ulysses_infer.kernels.scaled_rows import ROW
from ulysses_infer.model.quantization.products import ALIGNMENT, is_aligned, quantised_rows
from ulysses_infer.model.quantization.scaled import ScaledWeight
from ulysses_infer.model.quantization.scheme import Scheme

CAPABILITY = (9, 0)  # Hopper, the only one for which torch has a grouped FP8 product
DENSE_GENERATIONS = (9, 10)  # Hopper and Blackwell: elsewhere torch's grouped product reads the offsets on the host


@dataclass(frozen=True)
class TokenGroups:
    """The tokens of each expert: those of expert e end before row `offsets[e]`."""

    offsets: torch.Tensor
    """[E] int32"""

    @cached_property
    def ends(self) -> list[int]:
        """The same on the host; waits for the device."""
        ends: list[int] = self.offsets.tolist()
        return ends


def is_grouped(scheme: Scheme, views: Mapping[str, torch.Tensor]) -> bool:
    """Whether `grouped_product` can read these views of all experts' components on their device."""
    weight = views.get("weight")
    if weight is None or not isinstance(scheme, ScaledWeight):
        return False
    return capability(weight.device) == CAPABILITY and is_groupable(scheme, weight)


def is_groupable(scheme: ScaledWeight, weight: torch.Tensor) -> bool:
    """Whether the kernel supports the arithmetic and the strides. weight: [E, N, K]."""
    is_row_scaled = scheme.grain in ("tensor", "channel") and scheme.dtype == torch.float8_e4m3fn
    return is_row_scaled and len(weight) > 0 and is_aligned(weight[0])


def grouped_product(
    tokens: torch.Tensor, groups: TokenGroups, scheme: ScaledWeight, views: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """tokens: [S, K], each quantised by its own largest value; views of [E, N, K]; returns [S, N].

    A scale a token and one an output channel of an expert, or one for all of an expert's. No copy of the weight: what
    the kernel reads is column-major, a transposed view of it.
    """
    weight, scale = views["weight"], views[scheme.scale_name]
    rows = quantised_rows(tokens, ROW)
    channels = scale.reshape(len(weight), -1).expand(-1, weight.shape[1]).contiguous()
    output = torch._scaled_grouped_mm(
        rows.values,
        weight.transpose(1, 2),
        rows.scales[:, 0],
        channels,
        offs=groups.offsets,
        out_dtype=torch.bfloat16,
    )
    return output.to(tokens.dtype)


def stored_product(tokens: torch.Tensor, groups: TokenGroups, stored: StoredExperts) -> torch.Tensor:
    """tokens: [S, K]; returns [S, N]. Any format: weights are dequantised in registers, tokens are not quantised."""
    from ulysses_infer.kernels.experts import grouped_product as triton_product

    return triton_product(tokens, groups.offsets, stored)


def is_dense_grouped(tokens: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's grouped product of dense weights [E, N, K], views with strides, runs without the host."""
    found = capability(tokens.device)
    if found is None or found[0] not in DENSE_GENERATIONS or tokens.dtype != torch.bfloat16:
        return False
    return _is_dense_aligned(tokens) and _is_dense_aligned(weight)


def _is_dense_aligned(values: torch.Tensor) -> bool:
    """Whether one of the last two dimensions is dense, and the other's steps and the address are 16-byte multiples."""
    other = {values.stride(-1): values.stride(-2), values.stride(-2): values.stride(-1)}.get(1, 1)
    numbers = (other, values.storage_offset(), *values.stride()[:-2])
    return not any(number * values.element_size() % ALIGNMENT for number in numbers)
