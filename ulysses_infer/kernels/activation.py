"""Gated activations of feed-forward blocks, with FP8 quantisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.launch import launch
from ulysses_infer.kernels.quantisation import empty_quantised, quantised, scale_of, tile_groups
from ulysses_infer.kernels.scaled_rows import GROUP, NONE, ROW, QuantisedRows


@triton.jit
def gated_value(x, SILU: tl.constexpr):
    """SiLU of float32 values, or GELU by its tanh formula."""
    if SILU:
        return x / (1.0 + tl.exp(-x))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # 0.5 * (1 + tanh(v)) is sigmoid(2 * v)
        return x / (1.0 + tl.exp(-2.0 * inner))


@triton.jit
def gated_tile(gate, up, row, column, inside, gate_row, gate_shard, up_row, up_shard, size, SILU: tl.constexpr):
    """`activation(gate) * up` at `column` of one row, rounded as torch does, as float32.

    Column c is number `c % size` of shard `c // size`.
    """
    shard, place = column // size, column % size
    x = tl.load(gate + row * gate_row + shard * gate_shard + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_row + shard * up_shard + place, mask=inside, other=0.0).to(tl.float32)
    active = gated_value(x, SILU)
    dtype = gate.dtype.element_ty
    return (active.to(dtype).to(tl.float32) * y).to(dtype).to(tl.float32)


@triton.jit
def gated_kernel(
    gate,
    up,
    values,
    scales,
    gate_row,
    gate_shard,
    up_row,
    up_shard,
    size,
    width,
    scale_stride,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    KIND: tl.constexpr,
):
    """One program per row and `GROUPS` groups of 128 values; `KIND` is none or grouped."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < width
    active = gated_tile(gate, up, row, column, inside, gate_row, gate_shard, up_row, up_shard, size, SILU)
    if KIND == 0:
        tl.store(values + row * width + column, active.to(values.dtype.element_ty), mask=inside)
    else:
        scale = scale_of(tl.max(tl.abs(active), axis=1))
        tl.store(scales + group * scale_stride + row, scale, mask=group * 128 < width)
        spread = tl.broadcast_to(scale[:, None], [GROUPS, 128])
        tl.store(values + row * width + column, quantised(active, spread), mask=inside)


@triton.jit
def gated_rows_kernel(
    gate,
    up,
    values,
    scales,
    gate_row,
    gate_shard,
    up_row,
    up_shard,
    size,
    width,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
):
    """One program per row. Computes the activation twice: for the scale of the row, then for its values."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, GROUPS * 128)
    largest = tl.zeros([GROUPS * 128], tl.float32)
    for start in range(0, width, GROUPS * 128):
        column = start + tile
        active = gated_tile(gate, up, row, column, column < width, gate_row, gate_shard, up_row, up_shard, size, SILU)
        largest = tl.maximum(largest, tl.abs(active))
    scale = scale_of(tl.max(largest, axis=0, keep_dims=True))
    spread = tl.broadcast_to(scale, [GROUPS * 128])
    for start in range(0, width, GROUPS * 128):
        column = start + tile
        active = gated_tile(gate, up, row, column, column < width, gate_row, gate_shard, up_row, up_shard, size, SILU)
        tl.store(values + row * width + column, quantised(active, spread), mask=column < width)
    tl.store(scales + row + tl.arange(0, 1), scale)


def gated(activation: str, gate: torch.Tensor, up: torch.Tensor, kind: int = NONE) -> torch.Tensor | QuantisedRows:
    """`activation(gate) * up`, quantised by `kind`: [t, shards * F].

    gate, up: [t, shards, F], with dense last dimensions.
    """
    rows, shards, size = gate.shape
    width = shards * size
    output: torch.Tensor | QuantisedRows
    if kind == NONE:
        output = values = scales = gate.new_empty(rows, width)
    else:
        output = empty_quantised(gate, torch.Size((rows, width)), kind)
        values, scales = output.values, output.scales
    strides = (gate.stride(0), gate.stride(1), up.stride(0), up.stride(1))
    arguments = (gate, up, values, scales, *strides, size, width)
    silu = activation == "silu"
    if kind == ROW:
        groups = min(tile_groups(width), 32)
        launch(gated_rows_kernel, (rows,), *arguments, GROUPS=groups, SILU=silu, num_warps=8)
    else:
        groups = min(tile_groups(width), 8)
        stride = 0 if kind == NONE else scales.stride(1)
        grid = (rows, triton.cdiv(width, groups * GROUP))
        launch(gated_kernel, grid, *arguments, stride, GROUPS=groups, SILU=silu, KIND=kind)
    return output
