"""The kernel of `experts.py`."""

from __future__ import annotations

import triton
import triton.language as tl


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
def place_in_word(index, BITS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The lowest bit of value `index` of a word."""
    if INTERLEAVED:
        return ((index & 1) * 4 + index // 2) * BITS
    else:
        return index * BITS


@triton.jit
def as_numbers(codes, dtype: tl.constexpr, VALUES: tl.constexpr):
    """Stored values as `dtype`. e4m3 is read as bytes: GPUs before compute capability 8.9 convert it by its bits."""
    if VALUES == "e4m3":
        return codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif VALUES == "e4m3 bits":
        # Exponents of e4m3 and float16 have biases 7 and 15: as float16, the bits are 2 ** -8 times the value.
        bits = codes.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return (bits.to(tl.float16, bitcast=True) * 256.0).to(dtype)
    elif VALUES == "e2m1":
        doubled = (tl.full(codes.shape, 0xC8643210, tl.uint32) >> ((codes & 7) * 4).to(tl.uint32)) & 15
        magnitude = doubled.to(tl.float32) * 0.5
        return tl.where((codes & 8) != 0, -magnitude, magnitude).to(dtype)
    else:
        return codes.to(tl.float32).to(dtype)


@triton.jit
def as_scales(stored):
    """Scales in float32: bytes are exponents of two with bias 127."""
    if stored.dtype == tl.uint8:
        return (stored.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def experts_kernel(  # noqa: C901 (constants choose the branches)
    x,
    codes,
    scales,
    zeros,
    groups,
    offsets,
    output,
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
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program per tile of `ROWS` tokens of one expert and `COLUMNS` outputs.

    x: [S, inputs]; output: [S, outputs]. Positions count outputs and inputs from where the first word or group of the
    slice begins; the slice itself begins at position `first_output`, `first_input`.
    EVEN: all inputs of every iteration are in the slice.
    GROUPING: "one" (a scale per output), "runs" (consecutive inputs share a scale, and the first position begins a
    group), "each" (every input looks its group up, or computes it).
    """
    dtype: tl.constexpr = x.dtype.element_ty
    expert, first_row, end_row = find_tile(offsets, num_experts, tl.program_id(1), ROWS, EXPERTS)
    if expert >= num_experts:
        return
    expert = expert.to(tl.int64)
    row = first_row.to(tl.int64) + tl.arange(0, ROWS)
    has_row = row < end_row
    start = tl.program_id(0) * COLUMNS
    n = start + tl.arange(0, COLUMNS) - first_output
    has_n = (n >= 0) & (n < outputs)
    codes += expert * code_expert
    scales += expert * scale_expert
    zeros += expert * zero_expert
    scale_place = scales + (n + scale_first) // SCALE_OUTPUTS * scale_output
    zero_place = zeros + (n + zero_first) // ZERO_PER_WORD * zero_output
    zero_bit = place_in_word((n + zero_first) % ZERO_PER_WORD, BITS, INTERLEAVED)
    accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
    for position in range(first_input // DEPTH * DEPTH, first_input + inputs, DEPTH):
        k = position + tl.arange(0, DEPTH) - first_input
        has_k = (k >= 0) & (k < inputs)
        tokens = tl.load(x + row[:, None] * x_row + k[None, :], mask=has_row[:, None] & has_k[None, :], other=0.0)
        if PACKED == "inputs":
            word = position // PER_WORD + tl.arange(0, DEPTH // PER_WORD)
            place = (word - first_word)[:, None] * code_input + n[None, :] * code_output
            has_word = has_n[None, :]
            if not EVEN:
                has_word = has_word & ((word >= first_word) & (word < end_word))[:, None]
            words = tl.load(codes + place, mask=has_word, other=0)
            bit = place_in_word(tl.arange(0, PER_WORD), BITS, INTERLEAVED)
            read = tl.reshape(words[:, None, :] >> bit[None, :, None], [DEPTH, COLUMNS]) & ((1 << BITS) - 1)
        elif PACKED == "outputs":
            word = start // PER_WORD + tl.arange(0, COLUMNS // PER_WORD)
            has_word = word < end_word
            place = k[:, None] * code_input + word[None, :] * code_output
            words = tl.load(codes + place, mask=has_k[:, None] & has_word[None, :], other=0)
            bit = place_in_word(tl.arange(0, PER_WORD), BITS, INTERLEAVED)
            read = tl.reshape(words[:, :, None] >> bit[None, None, :], [DEPTH, COLUMNS]) & ((1 << BITS) - 1)
        else:
            place = k[:, None] * code_input + n[None, :] * code_output
            read = tl.load(codes + place, mask=has_k[:, None] & has_n[None, :], other=0)
        if GROUPING == "each":
            group = (k + group_first) // GROUP_SIZE
            if groups is not None:
                group = tl.load(groups + expert * group_expert + k, mask=has_k, other=0)
            has_group = has_k
        elif GROUPING == "runs":
            group = position // GROUP_SIZE + tl.arange(0, max(DEPTH // GROUP_SIZE, 1))
            has_group = (group + 1) * GROUP_SIZE > first_input
            has_group &= group * GROUP_SIZE < first_input + inputs
        else:
            group = tl.arange(0, 1)
            has_group = group == 0
        has_scale = has_group[:, None] & has_n[None, :]
        if HAS_ZEROS:
            zero = tl.load(zero_place[None, :] + group[:, None] * zero_input, mask=has_scale, other=0)
            zero = ((zero >> zero_bit[None, :]) & ((1 << BITS) - 1)) + ZERO
            read -= spread(zero, DEPTH)
        elif ZERO != 0:
            read -= ZERO
        weights = as_numbers(read, dtype, VALUES)
        if GROUPING == "one" or not HAS_SCALES:
            accumulator = tl.dot(tokens, weights, accumulator, input_precision="ieee")
        else:
            scale = as_scales(tl.load(scale_place[None, :] + group[:, None] * scale_input, mask=has_scale, other=0))
            if GROUPING == "runs" and GROUP_SIZE >= DEPTH:
                accumulator += tl.dot(tokens, weights, input_precision="ieee") * scale
            else:
                weights = (weights.to(tl.float32) * spread(scale, DEPTH)).to(dtype)
                accumulator = tl.dot(tokens, weights, accumulator, input_precision="ieee")
    if GROUPING == "one" and HAS_SCALES:
        accumulator *= as_scales(tl.load(scale_place, mask=has_n, other=0))[None, :]
    place = row[:, None] * output_row + n[None, :]
    tl.store(output + place, accumulator.to(dtype), mask=has_row[:, None] & has_n[None, :])


@triton.jit
def spread(of_groups, DEPTH: tl.constexpr):
    """of_groups: [G, COLUMNS]; returns one row per input, [DEPTH, COLUMNS]."""
    G: tl.constexpr = of_groups.shape[0]
    COLUMNS: tl.constexpr = of_groups.shape[1]
    wide = tl.broadcast_to(of_groups[:, None, :], [G, DEPTH // G, COLUMNS])
    return tl.reshape(wide, [DEPTH, COLUMNS])
