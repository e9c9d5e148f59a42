"""Quantisation of dense weights while they are loaded (`model.quantize`), each rank its own slice.

The weights are then stored as compressed-tensors stores them, so everything that serves such a checkpoint serves these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from ulysses_infer.arithmetic import ceil_div, round_up
from ulysses_infer.model.layers.linear import Cut
from ulysses_infer.model.loading.files import take
from ulysses_infer.model.quantization.component import Component, covering
from ulysses_infer.model.quantization.packed import WORD_BITS, CompressedWeight
from ulysses_infer.model.quantization.scaled import ScaledWeight
from ulysses_infer.parallel.layout import Span

Slice = tuple[int, list[Span]] | None
INT8_MAX, INT4_MAX = 127, 15
WORD_VALUES = WORD_BITS // 4
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Fractions of a group's range that 4 bits may cover; of these, the one with the least squared error is taken."""
ROWS_AT_A_TIME = 1 << 22  # weights quantised at a time, so that float32 copies stay small


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
        for rows in _chunks(weight):
            codes[rows] = (weight[rows].float() / _divisor(scales[rows])).round_().to(torch.int8)
        return {"weight": codes, self.scale_name: scales}


@dataclass(frozen=True)
class OnlineInt4(CompressedWeight):
    """A scale and a zero point per group of inputs, by rounding to nearest."""

    output_step = WORD_VALUES

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `OnlineScheme`."""
        outputs, inputs = weight.shape
        groups, words = ceil_div(inputs, self.group_size), ceil_div(inputs, WORD_VALUES)
        codes = weight.new_empty(outputs, words, dtype=torch.int32)
        scales = weight.new_empty(outputs, groups, dtype=torch.float32)
        zeros = weight.new_empty(outputs, groups, dtype=torch.uint8)
        for rows in _chunks(weight):
            values = nn.functional.pad(weight[rows].float(), (0, groups * self.group_size - inputs))
            chosen, scales[rows], zeros[rows] = _nearest(values.unflatten(1, (groups, self.group_size)))
            codes[rows] = _packed(chosen.flatten(1)[:, : words * WORD_VALUES])
        missing = round_up(outputs, WORD_VALUES) - outputs
        zero_words = _packed(nn.functional.pad(zeros, (0, 0, 0, missing)).t().contiguous()).t().contiguous()
        return {"weight_packed": codes, "weight_scale": scales, "weight_zero_point": zero_words}


def online_scheme(name: str, group_size: int) -> OnlineInt8 | OnlineInt4:
    """The scheme of `model.quantize` and `model.quantize_group_size`."""
    if name == "int8":
        return OnlineInt8("weight_scale", "channel", dtype=torch.int8)
    return OnlineInt4(group_size, symmetric=False)


def _chunks(weight: torch.Tensor) -> list[slice]:
    """Consecutive rows of `weight`, so many that a copy in float32 is small."""
    rows = max(1, ROWS_AT_A_TIME // max(1, weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    """`scales`, 1 in place of 0: a row of zeros has codes of zero."""
    return torch.where(scales == 0, 1.0, scales)


def _nearest(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values: [out, groups, size]; returns codes (uint8) of the same shape, scales and zero points [out, groups].

    Covering a little less than a group's range clips its extremes and rounds all others more finely.
    """
    low, high = (getattr(values, of)(dim=2).clamp(**to) for of, to in (("amin", {"max": 0}), ("amax", {"min": 0})))
    best = _within(values, low, high)
    least = _error(values, *best)
    for part in RANGES[1:]:
        found = _within(values, low * part, high * part)
        error = _error(values, *found)
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(
            torch.where(better[..., None] if new.dim() == 3 else better, new, old)
            for new, old in zip(found, best, strict=True)
        )
    codes, scales, zeros = best
    return codes, scales, zeros


def _within(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Codes (uint8), scales and zero points (uint8) that cover `low` to `high`."""
    scales = (high - low) / INT4_MAX
    divisor = _divisor(scales)
    zeros = (-low / divisor).round_()
    codes = (values / divisor[..., None]).round_().add_(zeros[..., None]).clamp_(0, INT4_MAX)
    return codes.to(torch.uint8), scales, zeros.to(torch.uint8)


def _error(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Squared error per group."""
    found = (codes.float() - zeros[..., None].float()).mul_(scales[..., None])
    return found.sub_(values).square_().sum(dim=2)


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
            return {name: take(part, self.components[name].kept("row", self._spans)) for name, part in parts.items()}
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
