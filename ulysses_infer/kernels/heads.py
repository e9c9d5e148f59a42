"""Query and key norms, rotary embedding and the move of heads to where attention reads them, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.launch import launch
from ulysses_infer.kernels.placement import HeadNorm, HeadTarget, HeadTemperature

HEADS = 4
"""Heads per program."""


@triton.jit
def head_columns(ROTATED: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Columns that are rotated with each other, [HALF] each, and which of them exist: two halves, or neighbours."""
    first = tl.arange(0, HALF)
    if PAIRS:
        return 2 * first, 2 * first + 1, first < ROTATED // 2
    else:
        return first, first + ROTATED // 2, first < ROTATED // 2


@triton.jit
def normed_heads(first, second, rest, weight, eps, WIDTH: tl.constexpr, ROTATED: tl.constexpr, dtype: tl.constexpr):
    """RMS norm of each head, given in three pieces of columns; rounded as torch does, as float32."""
    HALF: tl.constexpr = first.shape[1]
    REST: tl.constexpr = rest.shape[1]
    square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1) + tl.sum(rest * rest, axis=1)
    factor = tl.rsqrt(square / WIDTH + eps)[:, None]
    low, high, exists = head_columns(ROTATED, HALF, False)
    others = ROTATED + tl.arange(0, REST)
    low_weight = tl.load(weight + low, mask=exists, other=0.0).to(tl.float32)[None, :]
    high_weight = tl.load(weight + high, mask=exists, other=0.0).to(tl.float32)[None, :]
    other_weight = tl.load(weight + others, mask=others < WIDTH, other=0.0).to(tl.float32)[None, :]
    first = ((first * factor).to(dtype).to(tl.float32) * low_weight).to(dtype).to(tl.float32)
    second = ((second * factor).to(dtype).to(tl.float32) * high_weight).to(dtype).to(tl.float32)
    rest = ((rest * factor).to(dtype).to(tl.float32) * other_weight).to(dtype).to(tl.float32)
    return first, second, rest


@triton.jit
def normed_pieces(first, second, rest, eps, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """RMS norm of each head without weights, given in three pieces of columns; rounded as torch does, as float32."""
    square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1) + tl.sum(rest * rest, axis=1)
    factor = tl.rsqrt(square / WIDTH + eps)[:, None]
    first, second, rest = (first * factor).to(dtype), (second * factor).to(dtype), (rest * factor).to(dtype)
    return first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)


@triton.jit
def temperature_of(position, length, strength):
    """The factor of a query at `position`."""
    return 1.0 + strength * tl.log(1.0 + ((position + 1) // length).to(tl.float32))


@triton.jit
def stored(values, scale, dtype: tl.constexpr, to: tl.constexpr):
    """float32 values as memory of dtype `to` stores them: divided by `scale` and saturated if it is FP8 (e4m3)."""
    if to.primitive_bitwidth > 8:
        return values.to(to)
    else:
        divided = tl.div_rn(values, tl.zeros_like(values) + scale).to(dtype).to(tl.float32)
        return tl.minimum(tl.maximum(divided, -448.0), 448.0).to(to)


@triton.jit
def rotated(first, second, cosine, sine, low, high, is_pair, dtype: tl.constexpr):
    """The two halves of each head after rotary embedding; every product and sum is rounded as torch does."""
    cos_low = tl.load(cosine + low, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cosine + high, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sine + low, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sine + high, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    left = (first * cos_low).to(dtype).to(tl.float32) - (second * sin_low).to(dtype).to(tl.float32)
    right = (second * cos_high).to(dtype).to(tl.float32) + (first * sin_high).to(dtype).to(tl.float32)
    return left.to(dtype).to(tl.float32), right.to(dtype).to(tl.float32)


@triton.jit
def rotated_pairs(first, second, table, low, high, is_pair, dtype: tl.constexpr):
    """Neighbours after rotary embedding in float32, rounded once. table: cosine and sine of each pair."""
    cosine = tl.load(table + low, mask=is_pair, other=0.0)[None, :]
    sine = tl.load(table + high, mask=is_pair, other=0.0)[None, :]
    left, right = first * cosine - second * sine, second * cosine + first * sine
    return left.to(dtype).to(tl.float32), right.to(dtype).to(tl.float32)


@triton.jit
def move_rotated(
    source,
    target,
    exists,
    weight,
    eps,
    cosine,
    sine,
    scale,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    NORM: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Normalise and rotate the heads at `source` and write them to `target`: pointers, one per head.

    NORM: "" (none), "before" the rotation, "after" it, without weights. PAIRS: see `rotated_pairs`.
    """
    low, high, is_pair = head_columns(ROTATED, HALF, PAIRS)
    others = ROTATED + tl.arange(0, REST)
    inside = exists & is_pair[None, :]
    rest_inside = exists & (others < WIDTH)[None, :]
    dtype: tl.constexpr = source.dtype.element_ty
    to: tl.constexpr = target.dtype.element_ty
    first = tl.load(source[:, None] + low[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source[:, None] + high[None, :], mask=inside, other=0.0).to(tl.float32)
    rest = tl.load(source[:, None] + others[None, :], mask=rest_inside, other=0.0).to(tl.float32)
    if NORM == "before":
        first, second, rest = normed_heads(first, second, rest, weight, eps, WIDTH, ROTATED, dtype)
    if PAIRS:
        first, second = rotated_pairs(first, second, cosine, low, high, is_pair, dtype)
    else:
        first, second = rotated(first, second, cosine, sine, low, high, is_pair, dtype)
    if NORM == "after":
        first, second, rest = normed_pieces(first, second, rest, eps, WIDTH, dtype)
    tl.store(target[:, None] + low[None, :], stored(first, scale, dtype, to), mask=inside)
    tl.store(target[:, None] + high[None, :], stored(second, scale, dtype, to), mask=inside)
    tl.store(target[:, None] + others[None, :], stored(rest, scale, dtype, to), mask=rest_inside)


@triton.jit
def move(source, target, exists, factor, scale, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Copy the heads at `source`, times `factor`, to `target`: pointers, one per head."""
    column = tl.arange(0, COLUMNS)
    inside = exists & (column < WIDTH)[None, :]
    dtype: tl.constexpr = source.dtype.element_ty
    to: tl.constexpr = target.dtype.element_ty
    values = tl.load(source[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    values = (values * factor).to(dtype).to(tl.float32)
    tl.store(target[:, None] + column[None, :], stored(values, scale, dtype, to), mask=inside)


@triton.jit
def source_head(index, head, heads, INDEXED: tl.constexpr):
    """The head to read for each of `head`."""
    if INDEXED:
        return tl.load(index + head, mask=head < heads, other=0)
    else:
        return head


@triton.jit
def target_row(slots, token, SLOTS: tl.constexpr):
    """The row to which a token's key and value are written."""
    if SLOTS:
        return tl.load(slots + token)
    else:
        return token


@triton.jit
def heads_kernel(
    query,
    key,
    value,
    query_weight,
    key_weight,
    cosine,
    sine,
    query_index,
    index,
    slots,
    positions,
    query_out,
    key_out,
    value_out,
    query_eps,
    key_eps,
    key_scale,
    value_scale,
    temperature_strength,
    temperature_length,
    cosine_row,
    query_row,
    query_shard,
    query_part,
    key_row,
    key_shard,
    value_row,
    value_shard,
    query_out_row,
    query_out_shard,
    key_out_row,
    key_out_shard,
    value_out_row,
    value_out_shard,
    query_heads,
    kv_heads,
    query_source,
    kv_source,
    query_target,
    kv_target,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    QUERY_NORM: tl.constexpr,
    KEY_NORM: tl.constexpr,
    QUERY_INDEXED: tl.constexpr,
    INDEXED: tl.constexpr,
    SLOTS: tl.constexpr,
    PAIRS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program per token and `HEADS` heads: first all of the query, then of the key, then of the value.

    A tensor's head h is number `h % n` of shard `h // n`, n being `*_source` heads per shard where it is read and
    `*_target` where it is written. With INDEXED, KV head h is read from head `index[h]`, and with QUERY_INDEXED query
    head h from `query_index[h]`. With SLOTS, keys and values are written to row `slots[token]` instead of the token's
    own. The query is read from `PARTS` places per shard, `query_part` apart. ROTATED 0: nothing is rotated.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks = tl.cdiv(query_heads, HEADS)
    kv_blocks = tl.cdiv(kv_heads, HEADS)
    if block < query_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        read = source_head(query_index, head, query_heads, QUERY_INDEXED)
        part = read // query_source
        source = query + token * query_row + (part // PARTS) * query_shard + (part % PARTS) * query_part
        source += (read % query_source) * WIDTH
        target = query_out + token * query_out_row + (head // query_target) * query_out_shard
        target += (head % query_target) * WIDTH
        exists = (head < query_heads)[:, None]
        if ROTATED == 0:
            factor = 1.0
            if TEMPERATURE:
                factor = temperature_of(tl.load(positions + token), temperature_length, temperature_strength)
            move(source, target, exists, factor, 1.0, WIDTH, COLUMNS)
        else:
            move_rotated(
                source,
                target,
                exists,
                query_weight,
                query_eps,
                cosine + token * cosine_row,
                sine + token * cosine_row,
                1.0,
                WIDTH,
                ROTATED,
                HALF,
                REST,
                QUERY_NORM,
                PAIRS,
            )
    elif block < query_blocks + kv_blocks:
        head = (block - query_blocks) * HEADS + tl.arange(0, HEADS)
        read = source_head(index, head, kv_heads, INDEXED)
        source = key + token * key_row + (read // kv_source) * key_shard + (read % kv_source) * WIDTH
        target = key_out + target_row(slots, token, SLOTS) * key_out_row + (head // kv_target) * key_out_shard
        target += (head % kv_target) * WIDTH
        exists = (head < kv_heads)[:, None]
        if ROTATED == 0:
            move(source, target, exists, 1.0, key_scale, WIDTH, COLUMNS)
        else:
            move_rotated(
                source,
                target,
                exists,
                key_weight,
                key_eps,
                cosine + token * cosine_row,
                sine + token * cosine_row,
                key_scale,
                WIDTH,
                ROTATED,
                HALF,
                REST,
                KEY_NORM,
                PAIRS,
            )
    else:
        head = (block - query_blocks - kv_blocks) * HEADS + tl.arange(0, HEADS)
        read = source_head(index, head, kv_heads, INDEXED)
        move(
            value + token * value_row + (read // kv_source) * value_shard + (read % kv_source) * WIDTH,
            value_out
            + target_row(slots, token, SLOTS) * value_out_row
            + (head // kv_target) * value_out_shard
            + (head % kv_target) * WIDTH,
            (head < kv_heads)[:, None],
            1.0,
            value_scale,
            WIDTH,
            COLUMNS,
        )


def place_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    norms: tuple[HeadNorm | None, HeadNorm | None],
    cosine: torch.Tensor | None,
    sine: torch.Tensor | None,
    target: HeadTarget,
    query_index: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    temperature: HeadTemperature | None = None,
) -> None:
    """Normalise and rotate the heads of [t, shards, heads per shard * d] and write them to `target`.

    query: or [t, shards, parts, heads per part * d]. norms: of query and key. cosine, sine: [t, r], r <= d and even;
    without sine: cosine and sine of each pair of neighbours, float32; without both, nothing is rotated or normalised.
    query_index, index: the query head and the KV head to read for each one written. temperature: without rotation.
    """
    query = query if query.dim() == 4 else query[:, :, None]
    table = query if cosine is None else cosine
    width = target.query.shape[3]
    rotated_width = 0 if cosine is None else cosine.shape[1]
    rest = width - rotated_width
    query_heads = target.query.shape[1] * target.query.shape[2]
    kv_heads = target.key.shape[1] * target.key.shape[2]
    blocks = triton.cdiv(query_heads, HEADS) + 2 * triton.cdiv(kv_heads, HEADS)
    query_norm, key_norm = norms
    launch(
        heads_kernel,
        (query.shape[0], blocks),
        query,
        key,
        value,
        query if query_norm is None or query_norm.weight is None else query_norm.weight,
        key if key_norm is None or key_norm.weight is None else key_norm.weight,
        table,
        table if sine is None else sine,
        table if query_index is None else query_index,
        table if index is None else index,
        table if target.slots is None else target.slots,
        table if temperature is None else temperature.positions,
        target.query,
        target.key,
        target.value,
        0.0 if query_norm is None else query_norm.eps,
        0.0 if key_norm is None else key_norm.eps,
        target.key_scale,
        target.value_scale,
        0.0 if temperature is None else temperature.strength,
        1 if temperature is None else temperature.length,
        table.stride(0),
        query.stride(0),
        query.stride(1),
        query.stride(2),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        target.query.stride(0),
        target.query.stride(1),
        target.key.stride(0),
        target.key.stride(1),
        target.value.stride(0),
        target.value.stride(1),
        query_heads,
        kv_heads,
        query.shape[3] // width,
        key.shape[2] // width,
        target.query.shape[2],
        target.key.shape[2],
        WIDTH=width,
        ROTATED=rotated_width,
        HALF=triton.next_power_of_2(max(rotated_width // 2, 1)),
        REST=triton.next_power_of_2(max(rest, 1)),
        COLUMNS=triton.next_power_of_2(width),
        HEADS=HEADS,
        QUERY_NORM=_norm_place(query_norm),
        KEY_NORM=_norm_place(key_norm),
        QUERY_INDEXED=query_index is not None,
        INDEXED=index is not None,
        SLOTS=target.slots is not None,
        PAIRS=cosine is not None and sine is None,
        TEMPERATURE=temperature is not None,
        PARTS=query.shape[2],
        num_warps=2,
    )


def _norm_place(norm: HeadNorm | None) -> str:
    if norm is None:
        return ""
    return "after" if norm.weight is None else "before"
