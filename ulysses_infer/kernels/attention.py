"""Attention over a paged KV cache: prefill chunks and decodes in one launch, long contexts split over programs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.launch import FP8_CAPABILITY, capability, launch

LOG2_E = math.log2(math.e)
MIN_DOT = 16
"""The smallest side of a matrix product on tensor cores."""
PROCESSORS = 132
"""Streaming multiprocessors of devices that do not say how many they have: those of an H200."""
PROGRAMS_PER_PROCESSOR = 2
"""Contexts are split until this many programs run on each multiprocessor."""
MIN_SPLIT = 256
"""Keys that are worth a program of their own."""
SPLITS = 16
"""Partial results that the reduction reads at a time."""
FP8_DTYPES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


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
    output,
    sums,
    scale,
    softcap,
    value_scale,
    num_sequences,
    query_row,
    query_head,
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
            largest = tl.load(sinks + head, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634
            total = tl.full([ROWS], 1.0, tl.float32)
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


@dataclass(frozen=True)
class Sequences:
    """The sequences of a step, as `KernelSequences` has them."""

    cu_query_lens: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    max_query_len: int
    max_context_len: int


@dataclass(frozen=True)
class Softmax:
    """How scores become weights. value_scale: a factor of the output, for values that are stored divided by it."""

    scaling: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    value_scale: float = 1.0


@dataclass(frozen=True)
class Tiles:
    """Rows and keys per program, and how it is compiled."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tiles_of(rows: int, width: int, itemsize: int, fp8: str = "") -> Tiles:
    """Tiles for the wider of keys and values that fit the shared memory of every GPU (99 KiB) without spilling.

    rows: query rows of the longest sequence and KV head. fp8: see `fp8_of`.
    """
    wanted = max(MIN_DOT, triton.next_power_of_2(rows))
    if itemsize == 4:  # products in float32 have no tensor cores
        return Tiles(MIN_DOT, 16, 4, 1 if width > 256 else 2)
    if width > 256:
        return Tiles(MIN_DOT, 32, 4, 1) if wanted <= MIN_DOT and not fp8 else Tiles(32, 32, 8, 2)
    if width > 128:
        return Tiles(min(wanted, 64), 32, 4 if wanted <= MIN_DOT else 8, 2 if width > 192 else 3)
    few_keys = fp8.endswith("bits") or columns_of(width)[1] > 0
    if wanted >= 128:
        return Tiles(128, 32 if few_keys else 64, 8, 2)
    return Tiles(wanted, 32 if few_keys and wanted > 32 else 64, 4, 2)


def columns_of(width: int) -> tuple[int, int]:
    """`width` columns as two powers of two, the second 0 where one costs no more."""
    whole = max(MIN_DOT, triton.next_power_of_2(width))
    main = whole // 2
    rest = max(MIN_DOT, triton.next_power_of_2(max(1, width - main)))
    return (main, rest) if main >= MIN_DOT and main + rest < whole else (whole, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def splits_of(programs: int, keys: int, device: torch.device) -> int:
    """Parts into which the keys of a sequence, at most `keys`, are split when there are few `programs`."""
    return max(1, min(PROGRAMS_PER_PROCESSOR * processors(device) // max(1, programs), keys // MIN_SPLIT))


def fp8_of(dtype: torch.dtype, device: torch.device) -> str:
    """How the kernel reads a cache of `dtype`; empty for dtypes that it converts itself."""
    name = FP8_DTYPES.get(dtype, "")
    found = capability(device)
    return f"{name} bits" if name == "e4m3" and found is not None and found < FP8_CAPABILITY else name


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sequences: Sequences,
    softmax: Softmax,
    splits: int | None = None,
) -> torch.Tensor:
    """query: [T, Hq, d]; keys, values: [blocks, block size, Hkv, d | dv], dense in the last dimension; [T, Hq, dv].

    Values may be the first columns of the keys, as in latents. Nothing depends on values on the device, so a launch
    can be captured. splits: parts of each sequence's keys; None: as many as fill the GPU.
    """
    tokens, query_heads, width = query.shape
    block_size, kv_heads, value_width = keys.shape[1], keys.shape[2], values.shape[3]
    group, device = query_heads // kv_heads, query.device
    main, rest = columns_of(width)
    # Latents are keys and values at once.
    in_keys = value_width == main and value_width < width and keys.data_ptr() == values.data_ptr()
    decode = sequences.max_query_len == 1
    fp8 = fp8_of(keys.dtype, device)
    if fp8:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    tiles = tiles_of(group * sequences.max_query_len, max(width, value_width), query.element_size(), fp8)
    heads = min(group, tiles.rows)
    per_block = 1 if decode else tiles.rows // heads
    count = len(sequences.context_lens)
    blocks = count if decode else tokens // per_block + count
    programs = kv_heads * triton.cdiv(group, heads)
    if splits is None:
        limits = (sequences.max_context_len, softmax.window, softmax.chunk)
        seen = min(limit for limit in limits if limit is not None) + per_block - 1
        splits = splits_of(blocks * programs, seen, device)
    output = query.new_empty(tokens, query_heads, value_width)
    if splits > 1:
        target = query.new_empty(splits, tokens, query_heads, value_width, dtype=torch.float32)
        sums = query.new_empty(splits, tokens, query_heads, dtype=torch.float32)
    else:
        target, sums = output, output
    cap = softmax.softcap
    launch(
        attention_kernel,
        (blocks, programs, splits),
        query,
        keys,
        values,
        sequences.block_tables,
        sequences.cu_query_lens,
        sequences.context_lens,
        query if softmax.sinks is None else softmax.sinks,
        target,
        sums,
        softmax.scaling * LOG2_E if cap is None else 2.0 * softmax.scaling * LOG2_E / cap,
        0.0 if cap is None else cap * LOG2_E,
        softmax.value_scale,
        count,
        query.stride(0),
        query.stride(1),
        *keys.stride()[:3],
        *values.stride()[:3],
        sequences.block_tables.stride(0),
        target.stride(-3),
        target.stride(0),
        sums.stride(-2),
        sums.stride(0),
        GROUP=group,
        HEADS=heads,
        TOKENS=per_block,
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        WIDTH=width,
        MAIN=main,
        REST=rest,
        VALUE_WIDTH=value_width,
        VALUES=max(MIN_DOT, triton.next_power_of_2(value_width)),
        VALUES_IN_KEYS=in_keys,
        BLOCK_SIZE=block_size,
        WINDOW=softmax.window or 0,
        CHUNK=softmax.chunk or 0,
        SOFTCAP=cap is not None,
        SINKS=softmax.sinks is not None,
        FP8=fp8,
        DECODE=decode,
        SPLIT=splits > 1,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if splits > 1:
        launch(
            reduce_kernel,
            (tokens, query_heads, 1),
            target,
            sums,
            output,
            splits,
            target.stride(0),
            sums.stride(0),
            query_heads,
            VALUE_WIDTH=value_width,
            VALUES=max(MIN_DOT, triton.next_power_of_2(value_width)),
            SPLITS=SPLITS,
        )
    return output
