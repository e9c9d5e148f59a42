"""Quantisation of dense weights while they are loaded (`model.quantize`), each rank its own slice.

The weights are then stored as compressed-tensors stores them, so everything that serves such a checkpoint serves these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.model.layers.linear import Cut
from ulysses_infer.model.loading.files import take
from ulysses_infer.model.quantization.component import Component, covering
from ulysses_infer.model.quantization.float_zeros import FloatZeroWeight
from ulysses_infer.model.quantization.group_fit import STORED, fit_groups
from ulysses_infer.model.quantization.packed import WORD_BITS
from ulysses_infer.model.quantization.scaled import ScaledWeight
from ulysses_infer.parallel.layout import Span

Slice = tuple[int, list[Span]] | None
INT8_MAX, INT4_MAX = 127, 15
WORD_VALUES = WORD_BITS // 4
ROUNDED_AT_A_TIME = 1 << 22  # weights, so that float32 copies stay small
FITTED_AT_A_TIME = 1 << 17  # weights, so that what is computed several times stays in the CPU's cache


@runtime_checkable
class OnlineScheme(Protocol):
    """A scheme whose tensors can be made of a dense weight."""

    output_step: int
    """Outputs that share a stored word: a slice is quantised together with the rest of its first and last word."""

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """weight: [out, in] of any float dtype; returns its components by name."""
        ...


@dataclass(frozen=True)
class OnlineInt8(ScaledWeight):
    """One scale per output channel, symmetric."""

    output_step = 1

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `OnlineScheme`. The scale is of the whole row, so it is the same however the inputs are divided."""
        scales = weight.float().abs().amax(dim=1, keepdim=True) / INT8_MAX
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for rows in _chunks(weight, ROUNDED_AT_A_TIME):
            codes[rows] = (weight[rows].float() / _divisor(scales[rows])).round_().to(torch.int8)
        return {"weight": codes, self.scale_name: scales}


@dataclass(frozen=True)
class OnlineInt4(FloatZeroWeight):
    """A scale and a zero point per group of inputs, by `fit_groups`."""

    output_step = 1

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `OnlineScheme`."""
        outputs, inputs = weight.shape
        groups, words = ceil_div(inputs, self.group_size), ceil_div(inputs, WORD_VALUES)
        packed = weight.new_empty(outputs, words, dtype=torch.int32)
        scales, zeros = (weight.new_empty(outputs, groups, dtype=STORED) for _ in range(2))
        for rows in _chunks(weight, FITTED_AT_A_TIME):
            whole = _filled(weight[rows].float(), groups * self.group_size)
            codes, *found = fit_groups(whole.reshape(-1, self.group_size).t().contiguous(), INT4_MAX)
            scales[rows], zeros[rows] = (part.view(-1, groups) for part in found)
            packed[rows] = _packed(codes.t().reshape(whole.shape)[:, : words * WORD_VALUES])
        return {"weight_packed": packed, "weight_scale": scales, "weight_zero_point": zeros}


def online_scheme(name: str, group_size: int) -> OnlineInt8 | OnlineInt4:
    """The scheme of `model.quantize` and `model.quantize_group_size`."""
    if name == "int8":
        return OnlineInt8("weight_scale", "channel", dtype=torch.int8)
    return OnlineInt4(group_size)


def _chunks(weight: torch.Tensor, size: int) -> list[slice]:
    """Consecutive rows of `weight`, with about `size` values."""
    rows = max(1, size // max(1, weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    """`scales`, 1 in place of 0: a row of zeros has codes of zero."""
    return torch.where(scales == 0, 1.0, scales)


def _filled(values: torch.Tensor, width: int) -> torch.Tensor:
    """values: [n, in]; returns [n, width], each row's last value repeated, which widens no group's range."""
    missing = width - values.shape[1]
    return torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1) if missing else values


def _packed(values: torch.Tensor) -> torch.Tensor:
    """values: [n, 8 * words] uint8 below 16; returns [n, words] int32, the first value in the lowest bits."""
    nibbles = values.unflatten(1, (-1, 2))
    return (nibbles[..., 0] | nibbles[..., 1] << 4).contiguous().view(torch.int32)


class OnlineWeight:
    """How a rank makes its part of a quantised layer from the dense weight [out, in] (`transposed`: [in, out])."""

    def __init__(
        self,
        scheme: OnlineScheme,
        components: Mapping[str, Component],
        cut: Cut,
        spans: Sequence[Span],
        outputs: int,
        transposed: bool = False,
    ) -> None:
        """outputs: of the whole layer."""
        self.components = components
        self._scheme, self._cut, self._spans = scheme, cut, spans
        self._transposed = transposed
        step = scheme.output_step
        words = [covering(span, step) for span in spans]
        self._covers = [Span(word.start * step, min(word.stop * step, outputs)) for word in words]

    def dense_slices(self) -> Slice:
        """What to read of the dense weight: (dimension, spans); None for all of it.

        All inputs, because scales are of whole rows and groups.
        """
        if self._cut == "row":
            return None
        return int(self._transposed), self._covers

    @property
    def is_aligned(self) -> bool:
        """Whether what is read is exactly what is stored."""
        return self._covers == list(self._spans)

    def quantise(self, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        """dense: what `dense_slices` says; returns this rank's part of each component."""
        weight = dense.t() if self._transposed else dense
        if self._cut == "row":
            parts = self._scheme.quantise(weight)
            own = {name: take(part, self.components[name].kept("row", self._spans)) for name, part in parts.items()}
            return {name: part.contiguous() for name, part in own.items()}  # views would keep the memory of all inputs
        found: dict[str, list[torch.Tensor]] = {name: [] for name in self.components}
        start = 0
        for cover, span in zip(self._covers, self._spans, strict=True):
            for name, part in self._scheme.quantise(weight.narrow(0, start, cover.size)).items():
                found[name].append(self.components[name].view(part, "column", [cover], span))
            start += cover.size
        return {name: _joined(parts, self.components[name]) for name, parts in found.items()}

    def quantise_from_whole(self, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        """`quantise` of the whole dense weight."""
        return self.quantise(take(dense, self.dense_slices()))


class OnlineExperts:
    """`OnlineWeight` of one matrix of the experts that a rank stores."""

    def __init__(self, weight: OnlineWeight, own: Span, is_part: bool) -> None:
        """own: the experts that this rank stores; is_part: whether other ranks store others."""
        self.components = weight.components
        self._weight, self._own, self._is_part = weight, own, is_part
        self._kept = weight.dense_slices()
        # Slices of gate and up can only be read together if they are cut alike.
        self._is_cut = self._kept is not None and weight.is_aligned and not is_part

    def dense_slices(self) -> Slice:
        """What to read of the dense weights, [experts, out, in] or [experts, in, out]; None for all of it."""
        if self._is_part:
            return 0, [self._own]
        if not self._is_cut or self._kept is None:
            return None
        dimension, spans = self._kept
        return dimension + 1, spans

    def quantise(self, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        """dense: what `dense_slices` says; returns this rank's components, one expert's behind another's."""
        one = self._weight.quantise if self._is_cut else self._weight.quantise_from_whole
        found = [one(expert) for expert in dense]
        return {name: torch.stack([parts[name] for parts in found]) for name in found[0]} if found else {}


def _joined(parts: list[torch.Tensor], component: Component) -> torch.Tensor:
    if len(parts) == 1 or component.outputs is None:
        return parts[0]
    return torch.cat(parts, dim=component.outputs.dimension)
