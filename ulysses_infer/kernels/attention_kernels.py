"""The Triton kernels of `attention.py`: attention over a paged KV cache, and the reduction of split contexts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence_of(block, cu_query_lens, num_sequences, TOKENS: tl.constexpr):
    """The sequence to which query block `block` belongs.

    The blocks of sequence i start at `cu_query_lens[i] // TOKENS + i`, so that there are never more than
    `tokens // TOKENS + num_sequences` blocks; a sequence may have one block too many, without tokens.
    """
    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_query_lens + middle) // TOKENS + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def cached(place, mask, dtype: tl.constexpr, FP8: tl.constexpr):
    """Cached values as `dtype`. FP8 is read as bytes: GPUs before compute capability 8.9 convert e4m3 by its bits."""
    read = tl.load(place, mask=mask, other=0)
    if FP8 == "e4m3":
        return read.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif FP8 == "e5m2":
        return read.to(tl.float8e5, bitcast=True).to(dtype)
    elif FP8 == "e4m3 bits":
        # Exponents of e4m3 and float16 have biases 7 and 15: as float16, the bits are 2 ** -8 times the value.
        bits = read.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return (bits.to(tl.float16, bitcast=True) * 256.0).to(dtype)
    else:
        return read.to(dtype)


@triton.jit(do_not_specialize=["num_sequences"])
def attention_kernel(  # noqa: C901 (constants choose most branches)
    query,
    keys,
    values,
    block_tables,
    cu_query_lens,
    context_lens,
    sinks,
    slopes,
    relative,
    output,
    sums,
    scale,
    softcap,
    value_scale,
    num_sequences,
    query_row,
    query_head,
    sink_row,
    relative_row,
    relative_head,
    key_block,
    key_slot,
    key_head,
    value_block,
    value_slot,
    value_head,
    table_row,
    output_row,
    output_split,
    sums_row,
    sums_split,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    VALUES_IN_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    ALIBI: tl.constexpr,
    EXTENT: tl.constexpr,
    FP8: tl.constexpr,
    DECODE: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per block of `TOKENS` query tokens of a sequence, `HEADS` heads of a KV head, and split of its keys.

    Row r of a program is token r // HEADS and head r % HEADS. A head's columns are `MAIN` and, where that wastes less
    than the next power of two, `REST` more. DECODE: each sequence has at most one query token. SPLIT: write the
    normalised output of each split and its log-sum-exp (to base 2) for `reduce_kernel`. Scores are to base 2.
    """
    block = tl.program_id(0)
    head_tiles: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(1) // head_tiles
    split = tl.program_id(2)
    if DECODE:
        sequence = block
        first = 0
        start = tl.load(cu_query_lens + sequence)
    else:
        sequence = sequence_of(block, cu_query_lens, num_sequences, TOKENS)
        start = tl.load(cu_query_lens + sequence)
        first = (block - start // TOKENS - sequence) * TOKENS
    length = tl.load(cu_query_lens + sequence + 1) - start
    if first >= length:
        return
    context = tl.load(context_lens + sequence)
    dtype: tl.constexpr = query.dtype.element_ty

    row = tl.arange(0, ROWS)
    token = first + row // HEADS
    member = (tl.program_id(1) % head_tiles) * HEADS + row % HEADS
    exists = (row < TOKENS * HEADS) & (token < length) & (member < GROUP)
    head = kv_head * GROUP + member
    position = context - length + token
    column = tl.arange(0, MAIN)
    rows = query + (start + token).to(tl.int64) * query_row + head * query_head
    q = tl.load(rows[:, None] + column[None, :], mask=exists[:, None] & (column < WIDTH)[None, :], other=0.0)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        q_rest = tl.load(rows[:, None] + rest[None, :], mask=exists[:, None] & (rest < WIDTH)[None, :], other=0.0)

    earliest = context - length + first
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(begin, earliest - WINDOW + 1)
    if CHUNK > 0:
        begin = tl.maximum(begin, earliest - earliest % CHUNK)
    end = tl.minimum(earliest + TOKENS, context)
    if SPLIT:
        part = tl.cdiv(tl.cdiv(end - begin, KEYS), tl.num_programs(2)) * KEYS
        begin += split * part
        end = tl.minimum(begin + part, end)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:  # noqa: SIM102 (decided at compilation)
        if split == 0:
            own = sinks + (start + token).to(tl.int64) * sink_row + head
            largest = tl.load(own, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634
            total = tl.full([ROWS], 1.0, tl.float32)
    if ALIBI:
        slope = tl.load(slopes + head, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634
    if EXTENT > 0:
        by_distance = relative + (start + token).to(tl.int64) * relative_row + head * relative_head
    result = tl.zeros([ROWS, VALUES], tl.float32)
    value_column = tl.arange(0, VALUES)
    table = block_tables + sequence.to(tl.int64) * table_row

    for at in range(begin, end, KEYS):
        key = at + tl.arange(0, KEYS)
        inside = key < end
        number = tl.load(table + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        slot = key % BLOCK_SIZE
        places = keys + number * key_block + slot * key_slot + kv_head * key_head
        k = cached(places[:, None] + column[None, :], inside[:, None] & (column < WIDTH)[None, :], dtype, FP8)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if REST > 0:
            k_rest = cached(places[:, None] + rest[None, :], inside[:, None] & (rest < WIDTH)[None, :], dtype, FP8)
            score = tl.dot(q_rest, tl.trans(k_rest), score, input_precision=PRECISION)
        score *= scale
        if SOFTCAP:  # scale has the cap divided out; tanh by way of exp2
            score = softcap * (1.0 - 2.0 / (tl.exp2(score) + 1.0))
        if ALIBI:
            score += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
        if EXTENT > 0:
            distance = position[:, None] - key[None, :]
            reached = exists[:, None] & (distance >= 0) & (distance < EXTENT)
            added = tl.load(by_distance[:, None] + distance, mask=reached, other=0.0)
            score += added.to(tl.float32) * 1.4426950408889634
        seen = inside[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (position[:, None] - key[None, :] < WINDOW)
        if CHUNK > 0:
            seen = seen & (position[:, None] // CHUNK == key[None, :] // CHUNK)
        score = tl.where(seen, score, float("-inf"))

        new = tl.maximum(largest, tl.max(score, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(score - base[:, None])
        decay = tl.exp2(largest - base)
        total = total * decay + tl.sum(weight, axis=1)
        largest = new
        if VALUES_IN_KEYS:
            v = k
        else:
            places = values + number * value_block + slot * value_slot + kv_head * value_head
            inside_values = inside[:, None] & (value_column < VALUE_WIDTH)[None, :]
            v = cached(places[:, None] + value_column[None, :], inside_values, dtype, FP8)
        result = tl.dot(weight.to(dtype), v, result * decay[:, None], input_precision=PRECISION)

    result = result * (value_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    token_row = (start + token).to(tl.int64)
    target = output + token_row * output_row + head * VALUE_WIDTH
    if SPLIT:
        target += split.to(tl.int64) * output_split
        lse = tl.where(total == 0.0, float("-inf"), largest + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(sums + split.to(tl.int64) * sums_split + token_row * sums_row + head, lse, mask=exists)
    to: tl.constexpr = output.dtype.element_ty
    stored = exists[:, None] & (value_column < VALUE_WIDTH)[None, :]
    tl.store(target[:, None] + value_column[None, :], result.to(to), mask=stored)


@triton.jit(do_not_specialize=["splits"])
def reduce_kernel(
    partial,
    sums,
    output,
    splits,
    partial_split,
    sums_split,
    heads,
    VALUE_WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program per token and head: combines the outputs of its splits, weighted by their log-sum-exp."""
    row = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    column = tl.arange(0, VALUES)
    largest = float("-inf")
    total = 0.0
    result = tl.zeros([VALUES], tl.float32)
    for at in range(0, splits, SPLITS):
        split = at + tl.arange(0, SPLITS)
        lse = tl.load(sums + split.to(tl.int64) * sums_split + row, mask=split < splits, other=float("-inf"))
        new = tl.maximum(largest, tl.max(lse, axis=0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(lse - base)
        decay = tl.exp2(largest - base)
        place = partial + split.to(tl.int64) * partial_split + row * VALUE_WIDTH
        inside = (weight > 0.0)[:, None] & (column < VALUE_WIDTH)[None, :]
        part = tl.load(place[:, None] + column[None, :], mask=inside, other=0.0)
        result = result * decay + tl.sum(part * weight[:, None], axis=0)
        total = total * decay + tl.sum(weight, axis=0)
        largest = new
    result = result / tl.where(total == 0.0, 1.0, total)
    tl.store(output + row * VALUE_WIDTH + column, result.to(output.dtype.element_ty), mask=column < VALUE_WIDTH)
