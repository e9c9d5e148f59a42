"""Several column-parallel linears of one input, stored in one tensor and computed as one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ulysses_infer.model.layers.linear import ShiftLinear
from ulysses_infer.model.layers.matmul import linear
from ulysses_infer.parallel.layout import Place, Span


class StackedLinears:
    """Computes `linears` as one matrix product. Their parameters become views of one stacked tensor.

    Rows are ordered by the sp0 head shards of the base slice: first the rows of shard 0 of all linears, then those of
    shard 1, and so on. So the rows of every mode are contiguous. If sp0 > 1, parameters are reshaped to
    [sp0, rows, in] (biases to [sp0, rows]).
    """

    def __init__(self, linears: Sequence[ShiftLinear], base: Place) -> None:
        self.linears, self.base = linears, base
        self._sizes = [sum(span.size for span in each.sharding.base_spans(base)) // base.mode.sp for each in linears]
        self._weight: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self._piece: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._shards = 1
        for each in linears:
            each.is_stacked = True

    @staticmethod
    def fits(linears: Sequence[nn.Module], base: Place) -> bool:
        """Whether all are column-parallel and shard evenly, without shared rows (fewer KV heads than ranks)."""
        return all(
            isinstance(each, ShiftLinear)
            and each.cut == "column"
            and not each.transposed
            and _cuts_evenly(each, base)
            and (each.bias is None) == (linears[0].bias is None)
            and each.weight.dtype == linears[0].weight.dtype
            for each in linears
        )

    def bind(self, place: Place) -> None:
        """Switch to the rows of `place`'s shards. Copies only if the parameters have changed address."""
        if any(_is_released(each.weight) for each in self.linears):
            self._weight = self._bias = self._piece = None
            return
        self._weight = self._stacked("weight", self._weight)
        self._bias = None if self.linears[0].bias is None else self._stacked("bias", self._bias)
        first = place.weight_index * place.mode.sp - self.base.weight_index * self.base.mode.sp
        self._shards = place.mode.sp
        self._piece = self._rows(self._weight, first), None if self._bias is None else self._rows(self._bias, first)

    def _rows(self, whole: torch.Tensor, first: int) -> torch.Tensor:
        return whole[first : first + self._shards].flatten(0, 1)

    def parts(self, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """inputs: [..., in]; returns the output of each linear, in order."""
        assert self._piece is not None
        output = linear(inputs, *self._piece)
        if self._shards == 1:
            return output.split(self._sizes, dim=-1)
        return [part.flatten(-2) for part in output.unflatten(-1, (self._shards, -1)).split(self._sizes, dim=-1)]

    @torch.inference_mode(False)  # weight updates write into it outside of inference mode
    def _stacked(self, name: str, before: torch.Tensor | None) -> torch.Tensor:
        """The stacked tensor [sp0, all rows, ...]. Creates it unless the parameters are views of `before`."""
        parameters: list[nn.Parameter] = [getattr(each, name) for each in self.linears]
        if before is not None and all(_shares_memory(each, before) for each in parameters):
            return before
        shards, tail = self.base.mode.sp, parameters[0].shape[-1:] if name == "weight" else ()
        rows = zip(parameters, self._sizes, strict=True)
        whole = torch.cat([each.detach().reshape(shards, size, *tail) for each, size in rows], dim=1)
        for parameter, part in zip(parameters, whole.split(self._sizes, dim=1), strict=True):
            parameter.data = part[0] if shards == 1 else part
        return whole


def _cuts_evenly(linear: ShiftLinear, base: Place) -> bool:
    """Whether the shards of the base slice have equal, disjoint, consecutive ranges of its rows."""
    shards = base.mode.sp
    if shards == 1:
        return True
    if len(linear.sharding.parts) != 1:
        return False
    (part,), (stored,) = linear.sharding.parts, linear.sharding.base_spans(base)
    size = stored.size // shards
    first = base.weight_index * shards
    return all(
        part.span(first + i, base.world_size) == Span(stored.start + i * size, stored.start + (i + 1) * size)
        for i in range(shards)
    )


def _shares_memory(parameter: torch.Tensor, whole: torch.Tensor) -> bool:
    return parameter.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _is_released(parameter: torch.Tensor) -> bool:
    """Whether its memory is released because the engine sleeps: all strides are then 0."""
    return parameter.numel() > 1 and not any(parameter.stride())
