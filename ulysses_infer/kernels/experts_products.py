"""Products of a tile of tokens with stored weights, which are dequantised in registers."""

from __future__ import annotations

import triton
import triton.language as tl


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
def spread(of_groups, DEPTH: tl.constexpr):
    """of_groups: [G, COLUMNS]; returns one row per input, [DEPTH, COLUMNS]."""
    G: tl.constexpr = of_groups.shape[0]
    COLUMNS: tl.constexpr = of_groups.shape[1]
    wide = tl.broadcast_to(of_groups[:, None, :], [G, DEPTH // G, COLUMNS])
    return tl.reshape(wide, [DEPTH, COLUMNS])


@triton.jit
def add_product(  # noqa: C901 (constants choose the branches)
    accumulator,
    tokens,
    codes,
    scale_place,
    zero_place,
    zero_bit,
    groups,
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
    VALUES: tl.constexpr,
    PACKED: tl.constexpr,
    BITS: tl.constexpr,
    PER_WORD: tl.constexpr,
    EVEN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUPING: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
):
    """`accumulator` [ROWS, COLUMNS] plus `tokens` [ROWS, DEPTH] times an expert's matrix at inputs from `position` on.

    codes, groups: of the expert. scale_place, zero_place, zero_bit: [COLUMNS], where those of each output begin.
    """
    DEPTH: tl.constexpr = tokens.shape[1]
    COLUMNS: tl.constexpr = accumulator.shape[1]
    dtype: tl.constexpr = tokens.dtype
    k = position + tl.arange(0, DEPTH) - first_input
    has_k = (k >= 0) & (k < inputs)
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
            group = tl.load(groups + k, mask=has_k, other=0)
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
        if zero.dtype == tl.int32:
            zero = ((zero >> zero_bit[None, :]) & ((1 << BITS) - 1)) + ZERO
            read -= spread(zero, DEPTH)
        else:
            read = read.to(tl.float32) - spread(zero.to(tl.float32), DEPTH)
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
    return accumulator
