"""Weights in MXFP4, the OCP microscaling format: e2m1 values with one power-of-two scale per 32.

Source: "OCP Microscaling Formats (MX) Specification", version 1.0; the layout is that of gpt-oss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.kernels.experts_weights import StoredExperts
from ulysses_infer.model.quantization.component import Axis, Component
from ulysses_infer.parallel.layout import Span

BLOCK_VALUES = 32
EXPONENT_BIAS = 127  # of e8m0
E2M1_AS_BFLOAT16 = 2.0**-126  # value of the bits of an e2m1 number, read as a bfloat16, relative to the number


@dataclass(frozen=True)
class Mxfp4Weight:
    """`blocks` [out, in / 32, 16], two values per byte, low half first; `scales` [out, in / 32], exponents."""

    @property
    def ignored(self) -> frozenset[str]:
        """See `Scheme`."""
        return frozenset()

    def components(self, outputs: int, inputs: int) -> dict[str, Component]:
        """See `Scheme`."""
        blocks = ceil_div(inputs, BLOCK_VALUES)
        along = Axis(1, BLOCK_VALUES)
        return {
            "blocks": Component((outputs, blocks, BLOCK_VALUES // 2), torch.uint8, Axis(0), along),
            "scales": Component((outputs, blocks), torch.uint8, Axis(0), along),
        }

    def dequantise(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> torch.Tensor:
        """See `Scheme`."""
        values = _values(parts["blocks"]).mul_(_powers(parts["scales"])[..., None])
        return values.flatten(1).narrow(1, columns.start % BLOCK_VALUES, columns.size)

    def stored_experts(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> StoredExperts:
        """See `Scheme`."""
        words = parts["blocks"].view(torch.int32).flatten(2)  # a view: blocks lie behind one another
        return StoredExperts(
            words[:, :, columns.start % BLOCK_VALUES // 8 :],
            rows.size,
            columns.size,
            rows.start,
            columns.start,
            values="e2m1",
            packed="inputs",
            bits=4,
            scales=parts["scales"],
            group_size=BLOCK_VALUES,
        )


def _values(blocks: torch.Tensor) -> torch.Tensor:
    """blocks: [n, B, 16]; returns [n, B, 32] float32: sign, exponent and fraction moved to where bfloat16 has them."""
    codes = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2).to(torch.int16)
    bits = ((codes & 0x7) << 6).bitwise_or_((codes & 0x8) << 12)
    return bits.view(torch.bfloat16).mul_(1 / E2M1_AS_BFLOAT16).float()


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """The powers of two that e8m0 bytes represent."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - EXPONENT_BIAS)
