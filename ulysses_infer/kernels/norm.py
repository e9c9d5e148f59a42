"""RMS norm, with the residual addition before it and FP8 quantisation after it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.launch import launch
from ulysses_infer.kernels.quantisation import dense_rows, empty_quantised, quantised, scale_of, tile_groups
from ulysses_infer.kernels.scaled_rows import NONE, QuantisedRows


@triton.jit
def row_columns(GROUPS: tl.constexpr):
    """The columns of a row in a tile of `GROUPS` groups of 128."""
    return tl.arange(0, GROUPS)[:, None] * 128 + tl.arange(0, 128)[None, :]


@triton.jit
def write_normed(
    wide, weight, out, values, scales, row, scale_stride, width, eps, GROUPS: tl.constexpr, KIND: tl.constexpr
):
    """Normalise a row, `wide` [GROUPS, 128] float32, and write it to `out`, or quantised to `values` and `scales`.

    Rounds as torch does: after the norm, after the weight.
    """
    group = tl.arange(0, GROUPS)
    column = row_columns(GROUPS)
    inside = column < width
    dtype = out.dtype.element_ty
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
    column = row_columns(GROUPS)
    inside = column < width
    dtype = x.dtype.element_ty
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        before = tl.load(residual + row * width + column, mask=inside, other=0.0).to(tl.float32)
        total = (before + wide).to(dtype)
        tl.store(residual + row * width + column, total, mask=inside)
        wide = total.to(tl.float32)
    write_normed(wide, weight, out, values, scales, row, scale_stride, width, eps, GROUPS, KIND)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None, kind: int = NONE
) -> torch.Tensor | QuantisedRows:
    """The norm of `x` [..., D], or of `residual + x`, which overwrites `residual` (contiguous); quantised by `kind`."""
    flat = dense_rows(x)
    rows, width = flat.shape
    groups = tile_groups(width)
    output, (out, values, scales, scale_stride) = empty_normed(x, kind)
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


def empty_normed(
    x: torch.Tensor, kind: int
) -> tuple[torch.Tensor | QuantisedRows, tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """Memory for the norm of `x`, and the arguments `out, values, scales, scale_stride` with which kernels write it."""
    if kind == NONE:
        plain = x.new_empty(x.shape)
        return plain, (plain, plain, plain, 0)
    rows = empty_quantised(x, x.shape, kind)
    return rows, (x, rows.values, rows.scales, rows.scales.stride(1))  # x: not written


def norm_warps(groups: int) -> int:
    """Warps per row: about 16 values per thread."""
    return max(1, min(16, groups // 4))
