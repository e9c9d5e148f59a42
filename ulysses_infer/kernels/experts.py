"""Products of tokens with the matrices of their experts, which are dequantised in registers.

The grid depends only on the numbers of tokens and experts: each program finds its expert and its rows from offsets on
the device, and programs without rows return. So the host need not know how many tokens chose an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ulysses_infer.kernels.experts_kernel import experts_kernel
from ulysses_infer.kernels.experts_weights import StoredExperts
from ulysses_infer.kernels.launch import FP8_CAPABILITY, capability, launch

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Tiles:
    """Tokens, outputs and inputs per program and iteration, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def tiles_of(num_tokens: int, stored: StoredExperts, itemsize: int) -> Tiles:
    """Tiles that fit the shared memory of every GPU (99 KiB) without spilling. itemsize: of tokens."""
    if itemsize == 4:  # products in float32 have no tensor cores
        return Tiles(16, 32, 32, 4, 1)
    experts = max(1, len(stored.codes))
    rows = triton.next_power_of_2(triton.cdiv(num_tokens, experts))
    if rows >= 64 and stored.has_uneven_groups:
        return Tiles(64, 64, 64, 4, 3)
    if rows >= 64:  # partial sums per group, and unpacking, need registers
        return Tiles(64 if stored.packed or stored.group_size or rows == 64 else 128, 128, 64, 8, 3)
    if rows == 32:
        return Tiles(32, 64, 64 if stored.packed else 128, 4, 3)
    if stored.packed == "outputs":  # whole sectors of memory
        return Tiles(16, 64, 64, 4, 3)
    # A mask over words prevents wide loads; none is needed if the depth divides the inputs.
    divides_half = stored.inputs % 128 == 64
    return Tiles(16, 32, 64 if stored.packed and divides_half else 128, 4, 3)


def row_tiles(num_tokens: int, num_experts: int, rows: int) -> int:
    """The most tiles of `rows` tokens that any distribution over experts needs, each tile of one expert."""
    with_tokens = min(num_tokens, num_experts)
    return with_tokens + (num_tokens - with_tokens) // rows


def grouped_product(tokens: torch.Tensor, offsets: torch.Tensor, stored: StoredExperts) -> torch.Tensor:
    """tokens: [S, inputs], sorted by expert, those of expert e up to row `offsets[e]`; returns [S, outputs].

    offsets: [E] int32 on the device. Rows after the last expert's are not written.
    """
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    output = tokens.new_empty(len(tokens), stored.outputs)
    tiles = tiles_of(len(tokens), stored, tokens.element_size())
    grouping = _grouping(stored, tiles.depth)
    first_output = stored.first_output % stored.per_word if stored.packed == "outputs" else 0
    first_input = stored.first_input % _origin(stored, grouping)
    zero_per_word = 32 // stored.bits if stored.zeros is not None else 1
    codes, values = _codes(stored)
    grid = (
        triton.cdiv(first_output + stored.outputs, tiles.columns),
        row_tiles(len(tokens), len(codes), tiles.rows) if len(codes) else 0,
    )
    launch(
        experts_kernel,
        grid,
        tokens,
        codes,
        codes if stored.scales is None else stored.scales,
        codes if stored.zeros is None else stored.zeros,
        stored.groups,
        offsets,
        output,
        len(codes),
        stored.outputs,
        stored.inputs,
        first_output,
        first_input,
        first_input // stored.per_word,
        triton.cdiv(
            first_output + stored.outputs if stored.packed == "outputs" else first_input + stored.inputs,
            stored.per_word,
        ),
        tokens.stride(0),
        output.stride(0),
        *codes.stride(),
        *_strides(stored.scales),
        stored.first_output % stored.scale_outputs,
        *_strides(stored.zeros),
        stored.first_output % zero_per_word,
        0 if stored.groups is None else stored.groups.stride(0),
        stored.first_input % max(stored.group_size, 1),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        VALUES=values,
        PACKED=stored.packed,
        BITS=stored.bits,
        PER_WORD=stored.per_word,
        EVEN=first_input % tiles.depth == 0 and stored.inputs % tiles.depth == 0,
        INTERLEAVED=stored.interleaved,
        SCALE_OUTPUTS=stored.scale_outputs,
        GROUPING=grouping,
        GROUP_SIZE=max(stored.group_size, 1),
        HAS_SCALES=stored.scales is not None,
        HAS_ZEROS=stored.zeros is not None,
        ZERO=stored.zero,
        ZERO_PER_WORD=zero_per_word,
        EXPERTS=triton.next_power_of_2(max(len(codes), 1)),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
    )
    return output


def _grouping(stored: StoredExperts, depth: int) -> str:
    """How inputs find their scale and zero point; see the kernel."""
    if stored.groups is not None:
        return "each"
    if stored.group_size == 0:
        return "one"
    size = stored.group_size
    fits = size % depth == 0 or (depth % size == 0 and size & (size - 1) == 0)
    return "runs" if fits and size % stored.per_word == 0 else "each"


def _origin(stored: StoredExperts, grouping: str) -> int:
    """Positions of inputs begin at a multiple of this."""
    if grouping == "runs":
        return stored.group_size
    return stored.per_word if stored.packed == "inputs" else 1


def _codes(stored: StoredExperts) -> tuple[torch.Tensor, str]:
    """The codes as the kernel reads them, and how."""
    if stored.codes.dtype != E4M3:
        return stored.codes, stored.values
    found = capability(stored.codes.device)
    native = found is not None and found >= FP8_CAPABILITY
    return stored.codes.view(torch.uint8), "e4m3" if native else "e4m3 bits"


def _strides(part: torch.Tensor | None) -> tuple[int, int, int]:
    """Strides of [E, outputs, inputs], 0 where one value covers all."""
    if part is None:
        return 0, 0, 0
    expert, output, column = (0 if size == 1 else part.stride(place) for place, size in enumerate(part.shape))
    return expert, output, column
