"""Weights of a few bits, packed into 32-bit words, with scales and zero points per group of inputs.

AWQ: Lin et al., arXiv 2306.00978; GPTQ: Frantar et al., arXiv 2210.17323; the layouts are those of their checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.kernels.experts_weights import StoredExperts
from ulysses_infer.model.quantization.component import Axis, Component
from ulysses_infer.parallel.layout import Span

WORD_BITS = 32
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which four bits of a word, counted from the lowest, hold value 0, 1, ...


def unpack(words: torch.Tensor, dimension: int, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """The unsigned values of int32 `words`, packed along `dimension`, as int32; the first in the lowest bits."""
    places = order or range(WORD_BITS // bits)
    values = [(words >> place * bits) & ((1 << bits) - 1) for place in places]
    return torch.stack(values, dimension + 1).flatten(dimension, dimension + 1)


def _grouped(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """codes: [in, out]; zeros, scales: [G, out]; groups: [in]; returns the weight [out, in] in float32."""
    return ((codes - zeros[groups]).float() * scales[groups]).t()


def _groups(columns: Span, group_size: int, device: torch.device) -> torch.Tensor:
    """The group of each of the inputs `columns`, relative to the first one's. [in]"""
    size = _size(group_size, columns.stop)
    return torch.arange(columns.start, columns.stop, device=device) // size - columns.start // size


def _size(group_size: int, inputs: int) -> int:
    """Inputs per group: all of them if the checkpoint's group size is -1."""
    return group_size if group_size > 0 else inputs


@dataclass(frozen=True)
class AwqWeight:
    """`qweight` [in, out / 8], `qzeros` [in / group, out / 8], `scales` [in / group, out]; four bits."""

    group_size: int

    @property
    def ignored(self) -> frozenset[str]:
        """See `Scheme`."""
        return frozenset()

    def components(self, outputs: int, inputs: int) -> dict[str, Component]:
        """See `Scheme`."""
        size = _size(self.group_size, inputs)
        groups, words = ceil_div(inputs, size), ceil_div(outputs, 8)
        return {
            "qweight": Component((inputs, words), torch.int32, Axis(1, 8), Axis(0)),
            "qzeros": Component((groups, words), torch.int32, Axis(1, 8), Axis(0, size)),
            "scales": Component((groups, outputs), torch.float32, Axis(1), Axis(0, size)),
        }

    def dequantise(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> torch.Tensor:
        """See `Scheme`."""
        codes = unpack(parts["qweight"], 1, 4, AWQ_ORDER).narrow(1, rows.start % 8, rows.size)
        zeros = unpack(parts["qzeros"], 1, 4, AWQ_ORDER).narrow(1, rows.start % 8, rows.size)
        return _grouped(codes, zeros, parts["scales"], _groups(columns, self.group_size, codes.device))

    def stored_experts(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> StoredExperts:
        """See `Scheme`."""
        codes, zeros, scales = (parts[name].transpose(1, 2) for name in ("qweight", "qzeros", "scales"))
        return StoredExperts(
            codes,
            rows.size,
            columns.size,
            rows.start,
            columns.start,
            values="integer",
            packed="outputs",
            bits=4,
            interleaved=True,
            scales=scales,
            group_size=max(self.group_size, 0),
            zeros=zeros,
        )


@dataclass(frozen=True)
class GptqWeight:
    """`qweight` [in / p, out], `qzeros` [in / group, out / p], `scales` [in / group, out], p values a word.

    `reordered` (desc_act): `g_idx` [in] names each input's group, and every slice of inputs keeps all groups' scales.
    `zero_offset`: what is added to stored zero points, 1 in the first version of the format.
    """

    group_size: int
    bits: int = 4
    reordered: bool = False
    zero_offset: int = 1

    @property
    def ignored(self) -> frozenset[str]:
        """See `Scheme`."""
        return frozenset() if self.reordered else frozenset(("g_idx",))

    @property
    def _per_word(self) -> int:
        return WORD_BITS // self.bits

    def components(self, outputs: int, inputs: int) -> dict[str, Component]:
        """See `Scheme`."""
        size = _size(self.group_size, inputs)
        words, groups = self._per_word, ceil_div(inputs, size)
        along = None if self.reordered else Axis(0, size)
        found = {
            "qweight": Component((ceil_div(inputs, words), outputs), torch.int32, Axis(1), Axis(0, words)),
            "qzeros": Component((groups, ceil_div(outputs, words)), torch.int32, Axis(1, words), along),
            "scales": Component((groups, outputs), torch.float32, Axis(1), along),
        }
        if self.reordered:
            found["g_idx"] = Component((inputs,), torch.int32, inputs=Axis(0))
        return found

    def dequantise(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> torch.Tensor:
        """See `Scheme`."""
        words = self._per_word
        codes = unpack(parts["qweight"], 0, self.bits).narrow(0, columns.start % words, columns.size)
        zeros = unpack(parts["qzeros"], 1, self.bits).narrow(1, rows.start % words, rows.size) + self.zero_offset
        groups = parts["g_idx"].long() if self.reordered else _groups(columns, self.group_size, codes.device)
        return _grouped(codes, zeros, parts["scales"], groups)

    def stored_experts(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> StoredExperts:
        """See `Scheme`."""
        codes, zeros, scales = (parts[name].transpose(1, 2) for name in ("qweight", "qzeros", "scales"))
        return StoredExperts(
            codes,
            rows.size,
            columns.size,
            rows.start,
            columns.start,
            values="integer",
            packed="inputs",
            bits=self.bits,
            scales=scales,
            group_size=max(self.group_size, 0),
            zeros=zeros,
            zero=self.zero_offset,
            groups=parts.get("g_idx"),
        )


@dataclass(frozen=True)
class CompressedWeight:
    """compressed-tensors' pack-quantized: `weight_packed` [out, in / p], `weight_scale` [out, in / group].

    `weight_zero_point` [out / p, in / group] if not `symmetric`; `weight_g_idx` [in] if `reordered`.
    """

    group_size: int
    bits: int = 4
    symmetric: bool = True
    reordered: bool = False

    @property
    def ignored(self) -> frozenset[str]:
        """See `Scheme`."""
        return frozenset(("weight_shape",))

    def components(self, outputs: int, inputs: int) -> dict[str, Component]:
        """See `Scheme`."""
        size, words = _size(self.group_size, inputs), WORD_BITS // self.bits
        groups = ceil_div(inputs, size)
        along = None if self.reordered else Axis(1, size)
        found = {
            "weight_packed": Component((outputs, ceil_div(inputs, words)), torch.int32, Axis(0), Axis(1, words)),
            "weight_scale": Component((outputs, groups), torch.float32, Axis(0), along),
        }
        if not self.symmetric:
            shape = (ceil_div(outputs, words), groups)
            found["weight_zero_point"] = Component(shape, torch.int32, Axis(0, words), along)
        if self.reordered:
            found["weight_g_idx"] = Component((inputs,), torch.int32, inputs=Axis(0))
        return found

    def dequantise(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> torch.Tensor:
        """See `Scheme`."""
        words = WORD_BITS // self.bits
        codes = unpack(parts["weight_packed"], 1, self.bits).narrow(1, columns.start % words, columns.size)
        scales = parts["weight_scale"]
        if self.symmetric:
            zeros = codes.new_full((1, 1), 1 << (self.bits - 1)).expand(scales.shape)
        else:
            zeros = unpack(parts["weight_zero_point"], 0, self.bits).narrow(0, rows.start % words, rows.size)
        groups = parts["weight_g_idx"].long() if self.reordered else _groups(columns, self.group_size, codes.device)
        return _grouped(codes.t(), zeros.t(), scales.t(), groups)

    def stored_experts(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> StoredExperts:
        """See `Scheme`."""
        return StoredExperts(
            parts["weight_packed"],
            rows.size,
            columns.size,
            rows.start,
            columns.start,
            values="integer",
            packed="inputs",
            bits=self.bits,
            scales=parts["weight_scale"],
            group_size=max(self.group_size, 0),
            zeros=parts.get("weight_zero_point"),
            zero=1 << (self.bits - 1) if self.symmetric else 0,
            groups=parts.get("weight_g_idx"),
        )
