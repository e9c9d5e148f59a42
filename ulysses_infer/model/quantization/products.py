"""Matrix products with quantized weights: on FP8 tensor cores where possible, else dequantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from ulysses_infer.kernels.launch import FP8_CAPABILITY, capability, has_fp8, runs_products
from ulysses_infer.kernels.scaled_rows import ALIGNED_ROWS, GROUP, GROUPED, NONE, ROW, QuantisedRows
from ulysses_infer.model.layers.matmul import linear
from ulysses_infer.model.quantization.component import Component
from ulysses_infer.model.quantization.native_products import SEGMENT, NativeWeights, native_weights
from ulysses_infer.model.quantization.scaled import ScaledWeight
from ulysses_infer.model.quantization.scheme import Scheme
from ulysses_infer.parallel.layout import Span

TILES = {"cpu": 1 << 20, "cuda": 1 << 24}  # weight values dequantized at a time
BLOCK = 128  # the rows of a tile are a multiple of this, and of FP8 blocks on tensor cores
ALIGNMENT = 16  # bytes; required of sizes, strides and addresses by FP8 tensor cores
BLOCK_SCALING_CUDA = (12, 9)  # the first CUDA version with support
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
SMALLEST_SCALE = 1e-12  # minimum scale of activations, for tokens of zeros
FAST_ROWS = 256  # from this many rows on (prefill), partial sums stay in the tensor cores, with fewer bits


@dataclass(frozen=True)
class Piece:
    """Outputs `rows` and inputs `columns` of a layer: views of each stored component, and of the bias."""

    rows: Span
    columns: Span
    components: Mapping[str, Component]
    parts: Mapping[str, torch.Tensor]
    bias: torch.Tensor | None
    segment: int = SEGMENT
    """Inputs that share a scale where inputs are quantised on a CPU: slices of every mode end at multiples."""

    def tiles(self, size: int) -> Iterator[tuple[Span, dict[str, torch.Tensor]]]:
        """Tiles of at most `size` rows, split where `size` divides the outputs of the whole layer."""
        start = self.rows.start
        while start < self.rows.stop:
            rows = Span(start, min(self.rows.stop, start - start % size + size))
            yield rows, {n: self.components[n].within(part, self.rows, rows) for n, part in self.parts.items()}
            start = rows.stop


class Product(Protocol):
    """inputs [..., columns] times a piece: [..., rows], plus its bias."""

    @property
    def input_kind(self) -> int:
        """How it quantises its inputs (kernels/scaled_rows.py); it takes them quantised, too."""
        ...

    def __call__(self, inputs: torch.Tensor | QuantisedRows, piece: Piece) -> torch.Tensor:
        """The product, in the inputs' dtype."""
        ...


class DequantisedProduct:
    """Any scheme on any device: dequantizes some rows of the weight at a time, never all of it."""

    input_kind = NONE

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def __call__(self, inputs: torch.Tensor | QuantisedRows, piece: Piece) -> torch.Tensor:
        """See `Product`."""
        assert isinstance(inputs, torch.Tensor)
        output = inputs.new_empty(*inputs.shape[:-1], piece.rows.size)
        for rows, parts in piece.tiles(_tile_rows(piece.columns.size, TILES.get(inputs.device.type, TILES["cuda"]))):
            weight = self._scheme.dequantise(parts, rows, piece.columns).to(inputs.dtype).contiguous()
            first = rows.start - piece.rows.start
            output[..., first : first + rows.size] = linear(inputs, weight)
        return output if piece.bias is None else output.add_(piece.bias)


class StoredProduct:
    """Any scheme on a GPU with Triton, in one launch: the kernel of experts, for a single one.

    Weights are dequantised in registers; inputs are not quantised.
    """

    input_kind = NONE

    def __init__(self, scheme: Scheme, piece: Piece) -> None:
        parts = {name: part[None] for name, part in piece.parts.items()}
        self._stored = scheme.stored_experts(parts, piece.rows, piece.columns)

    def __call__(self, inputs: torch.Tensor | QuantisedRows, piece: Piece) -> torch.Tensor:
        """See `Product`."""
        from ulysses_infer.kernels.experts import grouped_product

        assert isinstance(inputs, torch.Tensor)
        rows = inputs.reshape(-1, inputs.shape[-1])
        ends = torch.full((1,), len(rows), dtype=torch.int32, device=rows.device)
        output = grouped_product(rows, ends, self._stored)
        if piece.bias is not None:
            output.add_(piece.bias)
        return output.view(*inputs.shape[:-1], piece.rows.size)


class NativeProduct:
    """Any scheme on a CPU, from what is stored (`native/products/quantised.c`); dequantised where that does not serve.

    In bfloat16, inputs of integer weights are quantised to 8 bits: one scale per token and segment of inputs.
    """

    input_kind = NONE

    def __init__(self, scheme: Scheme, weights: NativeWeights) -> None:
        self._weights, self._dequantised = weights, DequantisedProduct(scheme)

    def __call__(self, inputs: torch.Tensor | QuantisedRows, piece: Piece) -> torch.Tensor:
        """See `Product`."""
        assert isinstance(inputs, torch.Tensor)
        rows = inputs.reshape(-1, inputs.shape[-1])
        if not self._weights.serves(rows):
            return self._dequantised(inputs, piece)
        return self._weights.product(rows, piece.bias).view(*inputs.shape[:-1], piece.rows.size)


class RowScaledProduct:
    """FP8 on tensor cores, with one scale a token and one an output channel (or one for all of them).

    The weight's view is [N, K] with K contiguous, so its transpose is the column-major [K, N] that the kernel reads.
    Rows are followed by their stride, which of a row cut's view is the width of the whole stored slice: neither a
    slice of outputs nor one of inputs is copied.
    """

    input_kind = ROW

    def __init__(self, scheme: ScaledWeight) -> None:
        self._scheme = scheme

    def __call__(self, inputs: torch.Tensor | QuantisedRows, piece: Piece) -> torch.Tensor:
        """See `Product`."""
        weight, scale = piece.parts["weight"], piece.parts[self._scheme.scale_name]
        rows = quantised_rows(inputs, ROW)
        # N numbers; copied only if there is a single one
        channels = scale.reshape(1, -1).expand(1, weight.shape[0]).contiguous()
        output = torch._scaled_mm(
            rows.values,
            weight.t(),
            rows.scales,
            channels,
            out_dtype=torch.bfloat16,
            use_fast_accum=rows.num_rows >= FAST_ROWS,
        ).to(inputs.dtype)
        if piece.bias is not None:
            output.add_(piece.bias)
        return output.view(*inputs.shape[:-1], weight.shape[0])


class BlockScaledProduct:
    """FP8 on tensor cores, with one scale per 128 inputs of a token and one per 128 x 128 values of the weight."""

    input_kind = GROUPED

    def __init__(self, scheme: ScaledWeight) -> None:
        self._scheme = scheme

    def __call__(self, inputs: torch.Tensor | QuantisedRows, piece: Piece) -> torch.Tensor:
        """See `Product`."""
        weight, scale = piece.parts["weight"], piece.parts[self._scheme.scale_name]
        rows = quantised_rows(inputs, GROUPED)
        output = F.scaled_mm(
            rows.values,
            weight.t(),
            rows.scales,
            F.ScalingType.BlockWise1x128,
            padded_blocks(scale).t(),
            F.ScalingType.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )[: rows.num_rows].to(inputs.dtype)
        if piece.bias is not None:
            output.add_(piece.bias)
        return output.view(*inputs.shape[:-1], weight.shape[0])


def quantised_rows(inputs: torch.Tensor | QuantisedRows, kind: int) -> QuantisedRows:
    """`inputs` [..., K] quantised by `kind` unless they already are: one Triton kernel where it runs, else torch."""
    if isinstance(inputs, QuantisedRows):
        assert inputs.kind == kind
        return inputs
    if has_fp8(inputs.device):
        from ulysses_infer.kernels.quantisation import quantise

        return quantise(inputs, kind)
    rows, shape = inputs.reshape(-1, inputs.shape[-1]), inputs.shape
    if kind == ROW:
        return QuantisedRows(*quantised_tokens(rows, rows.shape[1]), kind, shape, inputs.dtype)
    values, scales = quantised_tokens(F.pad(rows, (0, 0, 0, -len(rows) % ALIGNED_ROWS)), GROUP)
    return QuantisedRows(values, scales.t().contiguous().t(), kind, shape, inputs.dtype)


def quantised_tokens(rows: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """rows: [t, K]; returns them in FP8, and one scale per `size` values of a row, [t, K / size] float32."""
    groups = rows.view(rows.shape[0], -1, size)
    scales = (groups.abs().amax(dim=-1).float() / FP8_MAX).clamp_(min=SMALLEST_SCALE)
    values = (groups / scales[..., None]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return values.view(rows.shape), scales


def padded_blocks(scale: torch.Tensor) -> torch.Tensor:
    """scale: [N / 128, K / 128]; returns it with its rows contiguous and a multiple of four long, as the kernel asks.

    A 16384th of the weight's size, laid out anew only where a view of the stored scales is not so already.
    """
    missing = -scale.shape[1] % 4
    return F.pad(scale, (0, missing)) if missing else scale.contiguous()


def choose_product(scheme: Scheme, piece: Piece) -> Product:
    """The fastest product that is correct for these views on their device."""
    weight = piece.parts.get("weight")
    if isinstance(scheme, ScaledWeight) and weight is not None and _on_tensor_cores(weight):
        if scheme.grain in ("tensor", "channel"):
            return RowScaledProduct(scheme)
        starts = (piece.rows.start, piece.columns.start, piece.rows.size, piece.columns.size)
        whole = scheme.block == (BLOCK, BLOCK) and not any(start % BLOCK for start in starts)
        if whole and _has_block_scaling(weight.device):
            return BlockScaledProduct(scheme)
    if runs_products(next(iter(piece.parts.values())).device):
        return StoredProduct(scheme, piece)
    return _native_product(scheme, piece) or DequantisedProduct(scheme)


def _native_product(scheme: Scheme, piece: Piece) -> NativeProduct | None:
    """The product of a CPU; None on other devices, or if there is no native code."""
    if next(iter(piece.parts.values())).device.type != "cpu" or not piece.rows.size:
        return None
    parts = {name: part[None] for name, part in piece.parts.items()}
    weights = native_weights(scheme.stored_experts(parts, piece.rows, piece.columns), piece.segment)
    return None if weights is None else NativeProduct(scheme, weights)


def _on_tensor_cores(weight: torch.Tensor) -> bool:
    """Whether the FP8 kernels can read this view, [N, K]: a GPU with support, and everything aligned."""
    found = capability(weight.device)
    if found is None or weight.dtype != torch.float8_e4m3fn:
        return False
    return found >= FP8_CAPABILITY and is_aligned(weight)


def is_aligned(weight: torch.Tensor) -> bool:
    """Whether sizes, row stride and address of an FP8 view [N, K] are multiples of 16 bytes."""
    numbers = (*weight.shape, weight.stride(0), weight.data_ptr())
    return weight.stride(1) == 1 and not any(number % ALIGNMENT for number in numbers)


def _has_block_scaling(device: torch.device) -> bool:
    """torch supports it on Hopper only."""
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return capability(device) == (9, 0) and (version >= BLOCK_SCALING_CUDA or device.type != "cuda")


def _tile_rows(columns: int, tile: int) -> int:
    rows = max(1, tile // max(1, columns))
    return rows - rows % BLOCK if rows > BLOCK else rows
