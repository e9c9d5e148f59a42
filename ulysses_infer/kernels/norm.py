"""RMS norm, with the residual addition before it and FP8 quantisation after it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.launch import launch
from ulysses_infer.kernels.quantisation import dense_rows, empty_quantised, quantised, scale_of, tile_groups
from ulysses_infer.kernels.scaled_rows import NONE, QuantisedRows


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    values,
    scales,
    x_stride,
    scale_stride,
    width,
    eps,
    GROUPS: tl.constexpr,
    ADD: tl.constexpr,
    KIND: tl.constexpr,
):
    """One program per row of `width` values, in a tile of `GROUPS` groups of 128.

    Rounds as torch does: after the addition, after the norm, after the weight.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < width
    dtype = x.dtype.element_ty
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        before = tl.load(residual + row * width + column, mask=inside, other=0.0).to(tl.float32)
        total = (before + wide).to(dtype)
        tl.store(residual + row * width + column, total, mask=inside)
        wide = total.to(tl.float32)
    square = tl.sum(tl.sum(wide * wide, axis=1), axis=0) / width
    normed = (wide * tl.rsqrt(square + eps)).to(dtype).to(tl.float32)
    normed = (normed * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    if KIND == 0:
        tl.store(out + row * width + column, normed, mask=inside)
    else:
        normed = normed.to(tl.float32)
        largest = tl.max(tl.abs(normed), axis=1)
        if KIND == 1:
            scale = scale_of(tl.max(largest, axis=0, keep_dims=True))
            tl.store(scales + row + tl.arange(0, 1), scale)
            spread = tl.broadcast_to(scale[:, None], [GROUPS, 128])
        else:
            scale = scale_of(largest)
            tl.store(scales + group * scale_stride + row, scale, mask=group * 128 < width)
            spread = tl.broadcast_to(scale[:, None], [GROUPS, 128])
        tl.store(values + row * width + column, quantised(normed, spread), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None, kind: int = NONE
) -> torch.Tensor | QuantisedRows:
    """The norm of `x` [..., D], or of `residual + x`, which overwrites `residual` (contiguous); quantised by `kind`."""
    flat = dense_rows(x)
    rows, width = flat.shape
    groups = tile_groups(width)
    output: torch.Tensor | QuantisedRows
    if kind == NONE:
        output = out = values = scales = x.new_empty(x.shape)
        scale_stride = 0
    else:
        output = empty_quantised(x, x.shape, kind)
        values, scales, scale_stride = output.values, output.scales, output.scales.stride(1)
        out = x  # not written
    launch(
        rms_norm_kernel,
        (rows,),
        flat,
        flat if residual is None else residual,
        weight,
        out,
        values,
        scales,
        flat.stride(0),
        scale_stride,
        width,
        eps,
        GROUPS=groups,
        ADD=residual is not None,
        KIND=kind,
        num_warps=norm_warps(groups),
    )
    return output


def norm_warps(groups: int) -> int:
    """Warps per row: about 16 values per thread."""
    return max(1, min(16, groups // 4))
