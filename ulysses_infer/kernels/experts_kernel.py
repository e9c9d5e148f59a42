"""The kernel of `experts.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from ulysses_infer.kernels.activation import gated_value
from ulysses_infer.kernels.experts_products import add_product, as_scales, place_in_word


@triton.jit
def find_tile(offsets, num_experts, tile, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first row, end of the expert's rows) of row tile `tile`; from `num_experts` on: no expert."""
    expert = tl.arange(0, EXPERTS)
    known = expert < num_experts
    start = tl.load(offsets + expert - 1, mask=known & (expert > 0), other=0)
    end = tl.load(offsets + expert, mask=known, other=0)
    tiles = tl.where(known, (end - start + ROWS - 1) // ROWS, 0).to(tl.int32)
    found = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    own, before = expert == found, tl.sum(tl.where(expert < found, tiles, 0), 0)
    return found, tl.sum(tl.where(own, start, 0), 0) + (tile - before) * ROWS, tl.sum(tl.where(own, end, 0), 0)


@triton.jit
def activated(gate, up, dtype: tl.constexpr, ACTIVATION: tl.constexpr):
    """`activation(gate) * up` of float32 values, rounded as torch does; as float32."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    active = gated_value(gate, ACTIVATION == "silu")
    return active.to(dtype).to(tl.float32) * up


@triton.jit
def add_dense_product(accumulator, tokens, weights, n, has_n, k, has_k, shard_size, shard_step, weight_row):
    """`accumulator` plus `tokens` [ROWS, DEPTH] times columns `k` of rows `n` of dense weights [shards, n, K]."""
    place = (n // shard_size) * shard_step + (n % shard_size) * weight_row
    read = tl.load(weights + place[None, :] + k[:, None], mask=has_k[:, None] & has_n[None, :], other=0.0)
    return tl.dot(tokens, read.to(tokens.dtype), accumulator, input_precision="ieee")


@triton.jit
def dense_tile(
    x,
    weights,
    up_weights,
    output,
    tile,
    rows,
    columns,
    inputs,
    x_row,
    output_row,
    shard_size,
    shard_step,
    weight_row,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Tile `tile` of x [rows, inputs] times dense weights [columns, inputs], or of the gated product of two."""
    dtype: tl.constexpr = x.dtype.element_ty
    column_tiles = tl.cdiv(columns, COLUMNS)
    row = (tile // column_tiles * ROWS).to(tl.int64) + tl.arange(0, ROWS)
    n = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    has_row, has_n = row < rows, n < columns
    accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
    second = tl.zeros([ROWS, COLUMNS], tl.float32)
    for position in range(0, inputs, DEPTH):
        k = position + tl.arange(0, DEPTH)
        has_k = k < inputs
        tokens = tl.load(x + row[:, None] * x_row + k[None, :], mask=has_row[:, None] & has_k[None, :], other=0.0)
        accumulator = add_dense_product(
            accumulator, tokens, weights, n, has_n, k, has_k, shard_size, shard_step, weight_row
        )
        if ACTIVATION != "":
            second = add_dense_product(
                second, tokens, up_weights, n, has_n, k, has_k, shard_size, shard_step, weight_row
            )
    if ACTIVATION != "":
        accumulator = activated(accumulator, second, dtype, ACTIVATION)
    place = row[:, None] * output_row + n[None, :]
    tl.store(output + place, accumulator.to(dtype), mask=has_row[:, None] & has_n[None, :])


@triton.jit
def experts_kernel(
    x,
    index,
    codes,
    up_codes,
    scales,
    up_scales,
    zeros,
    up_zeros,
    groups,
    offsets,
    output,
    shared_x,
    shared_weights,
    shared_up,
    shared_output,
    num_tiles,
    column_tiles,
    num_experts,
    outputs,
    inputs,
    first_output,
    first_input,
    first_word,
    end_word,
    x_row,
    output_row,
    code_expert,
    code_output,
    code_input,
    scale_expert,
    scale_output,
    scale_input,
    scale_first,
    zero_expert,
    zero_output,
    zero_input,
    zero_first,
    group_expert,
    group_first,
    shared_rows,
    shared_columns,
    shared_inputs,
    shared_x_row,
    shared_output_row,
    shared_shard_size,
    shared_shard_step,
    shared_weight_row,
    VALUES: tl.constexpr,
    PACKED: tl.constexpr,
    BITS: tl.constexpr,
    PER_WORD: tl.constexpr,
    EVEN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALE_OUTPUTS: tl.constexpr,
    GROUPING: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    ZERO_PER_WORD: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SHARED: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program per tile of `ROWS` tokens of one expert and `COLUMNS` outputs; with SHARED, more for a dense product.

    x: [S, inputs]; output: [S, outputs]. Positions count outputs and inputs from where the first word or group of the
    slice begins; the slice itself begins at position `first_output`, `first_input`.
    EVEN: all inputs of every iteration are in the slice.
    GROUPING: "one" (a scale per output), "runs" (consecutive inputs share a scale, and the first position begins a
    group), "each" (every input looks its group up, or computes it).
    GATHER: row r reads `x[index[r]]`. SCATTER: it is written to `output[index[r]]`, and rows after the last expert's
    are written as zeros; `offsets` has one more entry, their end.
    ACTIVATION: of the product with `codes`, which is then multiplied by the one with `up_codes`; "": one product.
    """
    tile = tl.program_id(0)
    if SHARED and tile >= num_tiles:
        dense_tile(
            shared_x,
            shared_weights,
            shared_up,
            shared_output,
            tile - num_tiles,
            shared_rows,
            shared_columns,
            shared_inputs,
            shared_x_row,
            shared_output_row,
            shared_shard_size,
            shared_shard_step,
            shared_weight_row,
            ACTIVATION,
            ROWS,
            COLUMNS,
            DEPTH,
        )
        return
    dtype: tl.constexpr = x.dtype.element_ty
    num_groups = num_experts + 1 if SCATTER else num_experts
    expert, first_row, end_row = find_tile(offsets, num_groups, tile // column_tiles, ROWS, EXPERTS)
    if expert >= num_groups:
        return
    end_input = first_input + inputs
    if SCATTER:
        end_input = tl.where(expert < num_experts, end_input, 0)  # the rows of no expert are zero
        expert = tl.minimum(expert, num_experts - 1)
    expert = expert.to(tl.int64)
    row = first_row.to(tl.int64) + tl.arange(0, ROWS)
    has_row = row < end_row
    source = tl.load(index + row, mask=has_row, other=0) if GATHER else row
    start = tile % column_tiles * COLUMNS
    n = start + tl.arange(0, COLUMNS) - first_output
    has_n = (n >= 0) & (n < outputs)
    scale_place = expert * scale_expert + (n + scale_first) // SCALE_OUTPUTS * scale_output
    zero_place = expert * zero_expert + (n + zero_first) // ZERO_PER_WORD * zero_output
    zero_bit = place_in_word((n + zero_first) % ZERO_PER_WORD, BITS, INTERLEAVED)
    own_groups = groups
    if groups is not None:
        own_groups = groups + expert * group_expert
    accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
    second = tl.zeros([ROWS, COLUMNS], tl.float32)
    for position in range(first_input // DEPTH * DEPTH, end_input, DEPTH):
        k = position + tl.arange(0, DEPTH) - first_input
        has_k = (k >= 0) & (k < inputs)
        tokens = tl.load(x + source[:, None] * x_row + k[None, :], mask=has_row[:, None] & has_k[None, :], other=0.0)
        accumulator = add_product(
            accumulator,
            tokens,
            codes + expert * code_expert,
            scales + scale_place,
            zeros + zero_place,
            zero_bit,
            own_groups,
            position,
            start,
            n,
            has_n,
            inputs,
            first_input,
            first_word,
            end_word,
            code_output,
            code_input,
            scale_input,
            zero_input,
            group_first,
            VALUES,
            PACKED,
            BITS,
            PER_WORD,
            EVEN,
            INTERLEAVED,
            GROUPING,
            GROUP_SIZE,
            HAS_SCALES,
            HAS_ZEROS,
            ZERO,
        )
        if ACTIVATION != "":
            second = add_product(
                second,
                tokens,
                up_codes + expert * code_expert,
                up_scales + scale_place,
                up_zeros + zero_place,
                zero_bit,
                own_groups,
                position,
                start,
                n,
                has_n,
                inputs,
                first_input,
                first_word,
                end_word,
                code_output,
                code_input,
                scale_input,
                zero_input,
                group_first,
                VALUES,
                PACKED,
                BITS,
                PER_WORD,
                EVEN,
                INTERLEAVED,
                GROUPING,
                GROUP_SIZE,
                HAS_SCALES,
                HAS_ZEROS,
                ZERO,
            )
    if GROUPING == "one" and HAS_SCALES:
        accumulator *= as_scales(tl.load(scales + scale_place, mask=has_n, other=0))[None, :]
        if ACTIVATION != "":
            second *= as_scales(tl.load(up_scales + scale_place, mask=has_n, other=0))[None, :]
    if ACTIVATION != "":
        accumulator = activated(accumulator, second, dtype, ACTIVATION)
    target = tl.load(index + row, mask=has_row, other=0) if SCATTER else row
    place = target[:, None] * output_row + n[None, :]
    tl.store(output + place, accumulator.to(dtype), mask=has_row[:, None] & has_n[None, :])
