"""One stored tensor of a quantized layer, and how its axes map to the layer's features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.model.layers.linear import Cut
from ulysses_infer.parallel.layout import Span


@dataclass(frozen=True)
class Axis:
    """A tensor dimension over features, `step` features per index (1, a block, the values of a packed word)."""

    dimension: int
    step: int = 1


@dataclass(frozen=True)
class Component:
    """A tensor of a whole layer: weight, packed weight, scales, zero points. An axis is None where it has no extent.

    A slice of features keeps every index that covers some of them: where the slice begins or ends inside a block, the
    block's scale is kept too, and a feature's index is always `feature // step`, in features of the whole layer.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    outputs: Axis | None = None
    inputs: Axis | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def has_rows(self) -> bool:
        """Whether it is a matrix whose rows cover outputs, so that those of several layers can be stacked."""
        return self.outputs is not None and self.outputs.dimension == 0 and len(self.shape) == 2

    def stacked(self, count: int) -> Component:
        """The same tensor for `count` equal layers, stacked in a first dimension."""
        outputs, inputs = (axis and Axis(axis.dimension + 1, axis.step) for axis in (self.outputs, self.inputs))
        return Component((count, *self.shape), self.dtype, outputs, inputs)

    def axis(self, cut: Cut) -> Axis | None:
        """The dimension that is sharded: outputs for column-parallel, inputs for row-parallel."""
        return self.outputs if cut == "column" else self.inputs

    def kept(self, cut: Cut, spans: Sequence[Span]) -> tuple[int, list[Span]] | None:
        """(dimension, indices) that cover the features `spans`; None for all of the tensor."""
        axis = self.axis(cut)
        return None if axis is None else (axis.dimension, [covering(span, axis.step) for span in spans])

    def stored_shape(self, cut: Cut, spans: Sequence[Span]) -> tuple[int, ...]:
        """The shape of the kept part."""
        kept, shape = self.kept(cut, spans), list(self.shape)
        if kept is not None:
            shape[kept[0]] = sum(span.size for span in kept[1])
        return tuple(shape)

    def view(self, stored: torch.Tensor, cut: Cut, spans: Sequence[Span], wanted: Span) -> torch.Tensor:
        """A view of `stored`, which keeps `spans`: the indices that cover the features `wanted` of one of them."""
        axis, offset = self.axis(cut), 0
        if axis is None:
            return stored
        for span in spans:
            indices = covering(span, axis.step)
            if span.start <= wanted.start and wanted.stop <= span.stop:
                found = covering(wanted, axis.step).relative_to(indices)
                return stored.narrow(axis.dimension, offset + found.start, found.size)
            offset += indices.size
        raise AssertionError((wanted, spans))

    def within(self, part: torch.Tensor, outer: Span, rows: Span) -> torch.Tensor:
        """A view of `part`, which covers the outputs `outer`: what covers the outputs `rows`."""
        return part if self.outputs is None else self.view(part, "column", [outer], rows)


def covering(span: Span, step: int) -> Span:
    """The indices that cover `span`, at `step` features per index."""
    return Span(span.start // step, ceil_div(span.stop, step))


def spread(values: torch.Tensor, dimension: int, span: Span, step: int) -> torch.Tensor:
    """Expands one value per index to one per feature of `span`; `values` holds the indices that cover it."""
    if step == 1:
        return values
    repeated = values.repeat_interleave(step, dimension)
    return repeated.narrow(dimension, span.start % step, span.size)
