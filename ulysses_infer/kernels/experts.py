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


def tiles_of(num_rows: int, stored: StoredExperts, itemsize: int, is_gated: bool = False) -> Tiles:
    """Tiles that fit the shared memory of every GPU (99 KiB) without spilling.

    num_rows: of an average expert. itemsize: of tokens. is_gated: two products with the same tokens.
    """
    if itemsize == 4:  # products in float32 have no tensor cores
        return Tiles(16, 32, 32, 4, 1)
    rows = triton.next_power_of_2(num_rows)
    if is_gated:
        return _gated_tiles(rows, stored)
    if rows >= 64 and stored.has_uneven_groups:
        return Tiles(64, 64, 64, 4, 3)
    if rows >= 64:  # partial sums per group, and unpacking, need registers
        return Tiles(64 if stored.packed or stored.group_size or rows == 64 else 128, 128, 64, 8, 3)
    if rows == 32:
        return Tiles(32, 64, 64 if stored.packed else 128, 4, 3)
    if stored.packed == "outputs":  # whole sectors of memory; with 4 warps sm_100 spills
        return Tiles(16, 64, 64, 8, 3)
    # A mask over words prevents wide loads; none is needed if the depth divides the inputs.
    divides_half = stored.inputs % 128 == 64
    return Tiles(16, 32, 64 if stored.packed and divides_half else 128, 4, 3)


def _gated_tiles(rows: int, stored: StoredExperts) -> Tiles:
    """Two sums, and two matrices that are dequantised, need twice the registers."""
    if stored.packed == "outputs":
        return Tiles(32 if rows > 16 else 16, 64, 64, 8, 2)
    if stored.packed:
        return Tiles(32 if rows > 16 else 16, 32, 64, 4, 2)
    if stored.codes.element_size() == 1:
        return Tiles(16, 32, 64, 4, 3) if rows <= 16 else Tiles(32, 32, 64, 8 if stored.group_size else 4, 3)
    if rows >= 64:
        return Tiles(64, 64, 64, 8, 3)
    return Tiles(32, 32, 128, 4, 3) if rows == 32 else Tiles(16, 32, 128, 4, 3)


def row_tiles(num_tokens: int, num_experts: int, rows: int) -> int:
    """The most tiles of `rows` tokens that any distribution over experts needs, each tile of one expert."""
    with_tokens = min(num_tokens, num_experts)
    return with_tokens + (num_tokens - with_tokens) // rows


@dataclass(frozen=True)
class DenseProduct:
    """A product of `x` [t, K] with dense weights [shards, n, K], computed in the same launch as that of experts."""

    x: torch.Tensor
    weights: torch.Tensor
    up: torch.Tensor | None = None
    """Weights of the other product, like `weights`, if the experts' are gated."""

    def empty_output(self) -> torch.Tensor:
        """[t, shards * n]."""
        return self.x.new_empty(len(self.x), self.weights.shape[0] * self.weights.shape[1])


def grouped_product(tokens: torch.Tensor, offsets: torch.Tensor, stored: StoredExperts) -> torch.Tensor:
    """tokens: [S, inputs], sorted by expert, those of expert e up to row `offsets[e]`; returns [S, outputs].

    offsets: [E] int32 on the device. Rows after the last expert's are not written.
    """
    tiles = tiles_of(_rows_of_each(len(tokens), len(stored.codes)), stored, tokens.element_size())
    output = tokens.new_empty(len(tokens), stored.outputs)
    _launch(tokens, None, offsets, stored, None, "", output, tiles, None, None)
    return output


def gated_product(
    tokens: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor,
    gate: StoredExperts,
    up: StoredExperts,
    activation: str,
    num_experts: int,
    shared: DenseProduct | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`activation(gate product) * up product` of tokens [t, inputs]; returns [S, outputs] and that of `shared`.

    Row r is token `index[r]`; rows and offsets are as in `grouped_product`. gate, up: alike, see `are_alike`.
    num_experts: over which the S rows are spread, those of other ranks, too.
    """
    tiles = tiles_of(_rows_of_each(len(index), num_experts), gate, tokens.element_size(), is_gated=True)
    output = tokens.new_empty(len(index), gate.outputs)
    other = None if shared is None else shared.empty_output()
    _launch(tokens, index, offsets, gate, up, activation, output, tiles, shared, other)
    return output, other


def down_product(
    hidden: torch.Tensor,
    index: torch.Tensor | None,
    offsets: torch.Tensor,
    down: StoredExperts,
    num_experts: int,
    shared: DenseProduct | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`grouped_product` of hidden [S, inputs]; returns [S, outputs] and the product of `shared`.

    index: None, or the row of the result for each row, a permutation. Then the rows after the last expert's are zero,
    and offsets has S as one more entry. num_experts: see `gated_product`.
    """
    tiles = tiles_of(_rows_of_each(len(hidden), num_experts), down, hidden.element_size())
    output = hidden.new_empty(len(hidden), down.outputs)
    other = None if shared is None else shared.empty_output()
    _launch(hidden, index, offsets, down, None, "", output, tiles, shared, other)
    return output, other


def are_alike(gate: StoredExperts, up: StoredExperts) -> bool:
    """Whether one kernel can read both: they differ in their addresses alone."""
    return gate.groups is None and up.groups is None and _description(gate) == _description(up)


def _description(stored: StoredExperts) -> tuple[object, ...]:
    parts = (stored.codes, stored.scales, stored.zeros)
    tensors = [(part.dtype, part.shape, part.stride()) for part in parts if part is not None]
    places = (
        stored.first_output % stored.per_word if stored.packed == "outputs" else 0,
        stored.first_output % stored.scale_outputs,
        stored.first_output % stored.zeros_per_word,
    )
    constants = (stored.values, stored.packed, stored.bits, stored.interleaved, stored.scale_outputs, stored.zero)
    return *tensors, places, constants, stored.outputs, stored.inputs, stored.first_input, stored.group_size


def _rows_of_each(num_rows: int, num_experts: int) -> int:
    rows: int = triton.cdiv(num_rows, max(num_experts, 1))
    return max(rows, 1)


def _launch(
    tokens: torch.Tensor,
    index: torch.Tensor | None,
    offsets: torch.Tensor,
    stored: StoredExperts,
    up: StoredExperts | None,
    activation: str,
    output: torch.Tensor,
    tiles: Tiles,
    shared: DenseProduct | None,
    shared_output: torch.Tensor | None,
) -> None:
    """Of gated products `index` is where rows are read, of others where they are written."""
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    scatter, second = index is not None and up is None, stored if up is None else up
    grouping = _grouping(stored, tiles.depth)
    first_output = stored.first_output % stored.per_word if stored.packed == "outputs" else 0
    first_input = stored.first_input % _origin(stored, grouping)
    (codes, values), (up_codes, _) = _codes(stored), _codes(second)
    num_groups = len(codes) + scatter
    column_tiles = triton.cdiv(first_output + stored.outputs, tiles.columns)
    num_tiles = column_tiles * row_tiles(len(output), num_groups, tiles.rows) if num_groups else 0
    arguments, shared_tiles = _shared_arguments(tokens, shared, shared_output, tiles)
    launch(
        experts_kernel,
        (num_tiles + shared_tiles,),
        tokens,
        tokens if index is None else index,
        codes,
        up_codes,
        codes if stored.scales is None else stored.scales,
        codes if second.scales is None else second.scales,
        codes if stored.zeros is None else stored.zeros,
        codes if second.zeros is None else second.zeros,
        stored.groups,
        offsets,
        output,
        *arguments[:4],
        num_tiles,
        column_tiles,
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
        stored.first_output % stored.zeros_per_word,
        0 if stored.groups is None else stored.groups.stride(0),
        stored.first_input % max(stored.group_size, 1),
        *arguments[4:],
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
        ZERO_PER_WORD=stored.zeros_per_word,
        GATHER=index is not None and not scatter,
        SCATTER=scatter,
        ACTIVATION=activation,
        SHARED=shared is not None,
        EXPERTS=triton.next_power_of_2(max(num_groups, 1)),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
    )


def _shared_arguments(
    tokens: torch.Tensor, shared: DenseProduct | None, output: torch.Tensor | None, tiles: Tiles
) -> tuple[tuple[torch.Tensor | int, ...], int]:
    """The kernel's arguments about `shared`, and its tiles."""
    if shared is None or output is None:
        return (tokens,) * 4 + (0,) * 8, 0
    (rows, columns), size = output.shape, shared.weights.shape[1]
    assert shared.x.stride(1) == shared.weights.stride(2) == 1
    strides = shared.x.stride(0), output.stride(0), size, *shared.weights.stride()[:2]
    tensors = shared.x, shared.weights, shared.weights if shared.up is None else shared.up, output
    num_tiles = triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.columns)
    return (*tensors, rows, columns, shared.weights.shape[2], *strides), num_tiles


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
