"""Attention over a paged KV cache: prefill chunks and decodes in one launch, long contexts split over programs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ulysses_infer.kernels.attention_kernels import attention_kernel, reduce_kernel
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
    """How scores become weights. sinks, alibi: [Hq], a logit and a slope of each head, float32.

    sinks may be those of each query token, [T, Hq]. relative: see `AttentionOptions`; dense in the last dimension.
    value_scale: a factor of the output, for values that are stored divided by it.
    """

    scaling: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    alibi: torch.Tensor | None = None
    value_scale: float = 1.0
    relative: torch.Tensor | None = None


@dataclass(frozen=True)
class Tiles:
    """Rows and keys per program, and how it is compiled."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tiles_of(rows: int, width: int, itemsize: int, fp8: str = "", relative: bool = False) -> Tiles:
    """Tiles for the wider of keys and values that fit the shared memory of every GPU (99 KiB) without spilling.

    rows: query rows of the longest sequence and KV head. fp8: see `fp8_of`. relative: whether logits by
    distance are added, whose addresses take registers.
    """
    wanted = _power_of_two(rows)
    if itemsize == 4:  # products in float32 have no tensor cores
        return Tiles(MIN_DOT, 16, 4, 1 if width > 256 else 2)
    if width > 256:
        return Tiles(MIN_DOT, 32, 4, 1) if wanted <= MIN_DOT and not fp8 else Tiles(32, 32, 8, 2)
    if width > 128:
        return Tiles(min(wanted, 64), 32, 4 if wanted <= MIN_DOT else 8, 2 if width > 192 else 3)
    if relative and wanted >= 64:
        return Tiles(64, 32, 8, 2)
    few_keys = fp8.endswith("bits") or columns_of(width)[1] > 0
    if wanted >= 128:
        return Tiles(128, 32 if few_keys else 64, 8, 2)
    return Tiles(wanted, 32 if few_keys and wanted > 32 else 64, 4, 2)


def columns_of(width: int) -> tuple[int, int]:
    """`width` columns as two powers of two, the second 0 where one costs no more."""
    whole = _power_of_two(width)
    main = whole // 2
    rest = _power_of_two(max(1, width - main))
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


@dataclass(frozen=True)
class Work:
    """How a launch divides its work among programs."""

    group: int
    """Query heads per KV head."""
    heads: int
    """Query heads per program."""
    tokens: int
    """Query tokens per program."""
    grid: tuple[int, int, int]
    """Blocks of query tokens, groups of heads, and splits of the keys."""
    tiles: Tiles
    decode: bool
    """Whether each sequence has at most one query token."""
    fp8: str
    """See `fp8_of`."""

    @property
    def splits(self) -> int:
        """Parts of each sequence's keys."""
        return self.grid[2]


def work_of(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sequences: Sequences,
    softmax: Softmax,
    splits: int | None,
) -> Work:
    """The work of `attention`, from shapes and static maxima alone."""
    num_tokens, query_heads, width = query.shape
    kv_heads, value_width, device = keys.shape[2], values.shape[3], query.device
    group, decode = query_heads // kv_heads, sequences.max_query_len == 1
    fp8 = fp8_of(keys.dtype, device)
    rows, relative = group * sequences.max_query_len, softmax.relative is not None
    tiles = tiles_of(rows, max(width, value_width), query.element_size(), fp8, relative)
    heads = min(group, tiles.rows)
    tokens = 1 if decode else tiles.rows // heads
    count = len(sequences.context_lens)
    blocks = count if decode else num_tokens // tokens + count
    programs = kv_heads * triton.cdiv(group, heads)
    if splits is None:
        limits = (sequences.max_context_len, softmax.window, softmax.chunk)
        seen = min(limit for limit in limits if limit is not None) + tokens - 1
        splits = splits_of(blocks * programs, seen, device)
    return Work(group, heads, tokens, (blocks, programs, splits), tiles, decode, fp8)


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
    work = work_of(query, keys, values, sequences, softmax, splits)
    shape = (*query.shape[:2], values.shape[3])
    output = query.new_empty(shape)
    if work.splits == 1:
        _attend(query, keys, values, sequences, softmax, work, output, output)
        return output
    partial = query.new_empty(work.splits, *shape, dtype=torch.float32)
    sums = query.new_empty(work.splits, *shape[:2], dtype=torch.float32)
    _attend(query, keys, values, sequences, softmax, work, partial, sums)
    _reduce(partial, sums, output)
    return output


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sequences: Sequences,
    softmax: Softmax,
    work: Work,
    output: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Launch the attention kernel. output, sums: [splits, T, Hq, dv] and [splits, T, Hq], or twice the output."""
    constants = {**_width_constants(query, keys, values), **_softmax_constants(softmax), **_work_constants(work)}
    if work.fp8:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    cap, sinks, relative = softmax.softcap, softmax.sinks, softmax.relative
    launch(
        attention_kernel,
        work.grid,
        query,
        keys,
        values,
        sequences.block_tables,
        sequences.cu_query_lens,
        sequences.context_lens,
        query if sinks is None else sinks,
        query if softmax.alibi is None else softmax.alibi,
        query if relative is None else relative,
        output,
        sums,
        softmax.scaling * LOG2_E if cap is None else 2.0 * softmax.scaling * LOG2_E / cap,
        0.0 if cap is None else cap * LOG2_E,
        softmax.value_scale,
        len(sequences.context_lens),
        *query.stride()[:2],
        0 if sinks is None or sinks.dim() == 1 else sinks.stride(0),
        *((0, 0) if relative is None else relative.stride()[:2]),
        *keys.stride()[:3],
        *values.stride()[:3],
        sequences.block_tables.stride(0),
        output.stride(-3),
        output.stride(0),
        sums.stride(-2),
        sums.stride(0),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=work.tiles.num_warps,
        num_stages=work.tiles.num_stages,
        **constants,
    )


def _width_constants(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> dict[str, Any]:
    width, value_width = query.shape[2], values.shape[3]
    main, rest = columns_of(width)
    return {
        "WIDTH": width,
        "MAIN": main,
        "REST": rest,
        "VALUE_WIDTH": value_width,
        "VALUES": _power_of_two(value_width),
        # Latents are keys and values at once.
        "VALUES_IN_KEYS": value_width == main and value_width < width and keys.data_ptr() == values.data_ptr(),
        "BLOCK_SIZE": keys.shape[1],
    }


def _softmax_constants(softmax: Softmax) -> dict[str, Any]:
    return {
        "WINDOW": softmax.window or 0,
        "CHUNK": softmax.chunk or 0,
        "SOFTCAP": softmax.softcap is not None,
        "SINKS": softmax.sinks is not None,
        "ALIBI": softmax.alibi is not None,
        "EXTENT": 0 if softmax.relative is None else softmax.relative.shape[2],
    }


def _work_constants(work: Work) -> dict[str, Any]:
    return {
        "GROUP": work.group,
        "HEADS": work.heads,
        "TOKENS": work.tokens,
        "ROWS": work.tiles.rows,
        "KEYS": work.tiles.keys,
        "FP8": work.fp8,
        "DECODE": work.decode,
        "SPLIT": work.splits > 1,
    }


def _reduce(partial: torch.Tensor, sums: torch.Tensor, output: torch.Tensor) -> None:
    """Combine the outputs of the splits, `partial` [splits, T, Hq, dv], into `output` [T, Hq, dv]."""
    num_tokens, heads, value_width = output.shape
    launch(
        reduce_kernel,
        (num_tokens, heads, 1),
        partial,
        sums,
        output,
        len(partial),
        partial.stride(0),
        sums.stride(0),
        heads,
        VALUE_WIDTH=value_width,
        VALUES=_power_of_two(value_width),
        SPLITS=SPLITS,
    )


def _power_of_two(width: int) -> int:
    """The columns that a tile of `width` columns takes."""
    return int(max(MIN_DOT, triton.next_power_of_2(width)))
