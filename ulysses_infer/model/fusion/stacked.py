"""Several column-parallel linears of one input, stored in one tensor and computed as one product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import nn

from ulysses_infer.kernels.scaled_rows import NONE, QuantisedRows
from ulysses_infer.model.layers.linear import ShiftLinear
from ulysses_infer.model.layers.matmul import linear
from ulysses_infer.model.quantization.component import Component
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.quantization.products import Piece, Product, choose_product
from ulysses_infer.parallel.layout import Mode, Place, Span

Linear = ShiftLinear | QuantizedLinear


class StackedLinears:
    """Computes `linears` as one matrix product. Their parameters become views of stacked tensors.

    Rows are ordered by the sp0 head shards of the base slice: first the rows of shard 0 of all linears, then those of
    shard 1, and so on. So the rows of every mode are contiguous. If sp0 > 1, parameters are reshaped to
    [sp0, rows, in] (biases to [sp0, rows]). FP8 weights are stacked together with their scales.

    If two shards share a KV head, their rows are [query of the first, key, value, query of the second]: those of either
    shard, and of both, are contiguous. The parameters are then [sp0 / 2, 2, rows, in] and [sp0 / 2, rows, in].
    """

    def __init__(self, linears: Sequence[Linear], base: Place) -> None:
        self.linears, self.base = linears, base
        self._is_paired = not all(_cuts_evenly(each, base) for each in linears)
        units = base.mode.sp // (2 if self._is_paired else 1)
        self._sizes = [sum(span.size for span in each.sharding.base_spans(base)) // units for each in linears]
        """Rows of each linear in a unit: a shard, or two that share KV heads."""
        self._steps = _stacked_parameters(linears[0])
        self._wholes: dict[str, torch.Tensor] = {}
        self._product: Product = _DenseProduct()
        self._piece: Piece | None = None
        self._views: dict[Mode, tuple[Product, Piece]] = {}
        self._shards, self._is_first_of_pair = 1, True
        for each in linears:
            each.is_stacked = True

    @staticmethod
    def fits(linears: Sequence[nn.Module], base: Place) -> bool:
        """Whether all are column-parallel and shard evenly; of linears with heads, two shards may share those of all
        but the first."""
        if not (_are_linears(linears) and _are_alike(linears) and all(map(_is_column, linears))):
            return False
        first, *others = linears
        if not _cuts_evenly(first, base):
            return False
        return all(_cuts_evenly(each, base) for each in others) or (
            len(others) == 2 and _halves_evenly(first, base) and all(_cuts_in_pairs(each, base) for each in others)
        )

    @property
    def input_kind(self) -> int:
        """See `QuantizedLinear.input_kind`."""
        return self._product.input_kind

    def bind(self, place: Place) -> None:
        """Switch to the rows of `place`'s shards. Copies only if the parameters have changed address."""
        self._shards = place.mode.sp
        self._is_first_of_pair = place.weight_index * place.mode.sp % 2 == 0
        if place.mode not in self._views:
            if any(_is_released(parameter) for each in self.linears for parameter in each.parameters()):
                self._wholes, self._piece = {}, None
                return
            self._wholes = {name: self._stacked(name, step) for name, step in self._steps.items()}
            self._views[place.mode] = self._view(place)
        self._product, self._piece = self._views[place.mode]

    def forget_views(self) -> None:
        """See `ShiftLinear.forget_views`."""
        self._views.clear()

    def _view(self, place: Place) -> tuple[Product, Piece]:
        linear = self.linears[0]
        parts = {name: self._rows(name, place) for name in self._wholes}
        bias = parts.pop("bias", None)
        rows = Span(0, self._num_rows)
        if isinstance(linear, ShiftLinear):
            return _DenseProduct(), Piece(rows, Span(0, parts["weight"].shape[1]), {}, parts, bias)
        piece = Piece(rows, Span(0, linear.in_features), linear.components, parts, bias)
        return choose_product(linear.scheme, piece), piece

    def _rows(self, name: str, place: Place) -> torch.Tensor:
        """The rows of `place` in a stacked tensor."""
        whole, step = self._wholes[name], self._steps[name]
        first = place.weight_index * place.mode.sp - self.base.weight_index * self.base.mode.sp
        if not self._is_paired:
            return whole[first : first + self._shards].flatten(0, 1)
        if self._shards > 1:
            return whole[first // 2 : (first + self._shards) // 2].flatten(0, 1)
        query, key, value = (size // step for size in self._sizes)
        start = first % 2 * query // 2
        return whole[first // 2, start : start + query // 2 + key + value]

    @property
    def _num_rows(self) -> int:
        query, *others = self._sizes
        if not self._is_paired:
            return self._shards * sum(self._sizes)
        return self._shards * sum(self._sizes) // 2 if self._shards > 1 else query // 2 + sum(others)

    def parts(self, inputs: torch.Tensor | QuantisedRows) -> Sequence[torch.Tensor]:
        """inputs: [..., in]; returns the output of each linear, in order."""
        return [part.flatten(len(inputs.shape) - 1) for part in self.shard_parts(inputs)]

    def shard_parts(self, inputs: torch.Tensor | QuantisedRows) -> Sequence[torch.Tensor]:
        """inputs: [..., in]; returns the output of each linear as [..., shards, features of a shard]: views.

        If shards share KV heads, those of both are one shard, and the first output is [..., pairs, 2, features].
        """
        assert self._piece is not None
        output = self._product(inputs, self._piece)
        if not self._is_paired:
            return output.unflatten(-1, (self._shards, -1)).split(self._sizes, dim=-1)
        query, key, value = self._sizes
        if self._shards == 1:
            halves, key_first = (query // 2, key, value), (key, value, query // 2)
            sizes = halves if self._is_first_of_pair else key_first
            pieces = output.unsqueeze(-2).split(sizes, dim=-1)
            return pieces if self._is_first_of_pair else (pieces[2], pieces[0], pieces[1])
        output = output.unflatten(-1, (self._shards // 2, -1))
        _, keys, values, _ = output.split((query // 2, key, value, query // 2), dim=-1)
        step = query // 2 + key + value
        queries = output.unfold(-1, query // 2, step)  # both halves
        return queries, keys, values

    def dense_parts(self) -> Sequence[torch.Tensor]:
        """See `Projection.dense_parts`."""
        if self._piece is None or self._piece.bias is not None or not isinstance(self._product, _DenseProduct):
            return []
        return self._piece.parts["weight"].unflatten(0, (self._shards, -1)).split(self._sizes, dim=1)

    @torch.inference_mode(False)  # weight updates write into it outside of inference mode
    def _stacked(self, name: str, step: int) -> torch.Tensor:
        """The stacked tensor [sp0, all rows, ...], of `step` features per row.

        Created unless the parameters are views of it already.
        """
        parameters: list[nn.Parameter] = [getattr(each, name) for each in self.linears]
        before = self._wholes.get(name)
        if before is not None and all(_shares_memory(each, before) for each in parameters):
            return before
        shards, tail = self.base.mode.sp, _tail(self.linears[0], name)
        sizes = [size // step for size in self._sizes]
        if self._is_paired:
            return _paired(parameters, sizes, shards // 2, tail)
        rows = zip(parameters, sizes, strict=True)
        whole = torch.cat([each.detach().reshape(shards, size, *tail) for each, size in rows], dim=1)
        for parameter, part in zip(parameters, whole.split(sizes, dim=1), strict=True):
            parameter.data = part[0] if shards == 1 else part
        return whole


class _DenseProduct:
    """The product with a weight that is not quantised. Implements `Product`."""

    input_kind = NONE

    def __call__(self, inputs: torch.Tensor | QuantisedRows, piece: Piece) -> torch.Tensor:
        assert isinstance(inputs, torch.Tensor)
        return linear(inputs, piece.parts["weight"], piece.bias)


def _are_linears(modules: Sequence[nn.Module]) -> TypeGuard[Sequence[Linear]]:
    return all(isinstance(each, ShiftLinear | QuantizedLinear) for each in modules)


def _are_alike(linears: Sequence[Linear]) -> bool:
    """Whether all have the same parameters, of the same dtypes."""
    first = _description(linears[0])
    return all(type(each) is type(linears[0]) and _description(each) == first for each in linears)


def _description(linear: Linear) -> tuple[object, ...]:
    scheme = linear.scheme if isinstance(linear, QuantizedLinear) else None
    return scheme, {name: parameter.dtype for name, parameter in linear.named_parameters()}


def _is_column(linear: Linear) -> bool:
    """Whether its outputs are sharded, and the rows of its parameters with them."""
    if isinstance(linear, ShiftLinear):
        return linear.cut == "column" and not linear.transposed
    return linear.cut == "column" and all(each.has_rows for each in linear.components.values())


def _stacked_parameters(linear: Linear) -> dict[str, int]:
    """The parameters to stack, and how many output features a row of each covers."""
    steps = {"weight": 1} if isinstance(linear, ShiftLinear) else _component_steps(linear.components)
    return steps if linear.bias is None else {**steps, "bias": 1}


def _component_steps(components: Mapping[str, Component]) -> dict[str, int]:
    return {name: each.outputs.step for name, each in components.items() if each.outputs is not None}


def _tail(linear: Linear, name: str) -> torch.Size:
    """The dimensions of a parameter after its rows."""
    return linear.get_parameter(name).shape[-1:] if name != "bias" else torch.Size(())


def _cuts_evenly(linear: Linear, base: Place) -> bool:
    """Whether the shards of the base slice have equal, disjoint, consecutive ranges of its rows, and whole blocks."""
    shards = base.mode.sp
    if shards > 1 and len(linear.sharding.parts) != 1:
        return False
    stored = linear.sharding.base_spans(base)
    size = sum(span.size for span in stored) // shards
    edges = (size, *(span.start for span in stored))
    if any(edge % step for step in _stacked_parameters(linear).values() for edge in edges):
        return False
    first, part, start = base.weight_index * shards, linear.sharding.parts[0], stored[0].start
    return shards == 1 or all(
        part.span(first + i, base.world_size) == Span(start + i * size, start + (i + 1) * size) for i in range(shards)
    )


def _halves_evenly(linear: Linear, base: Place) -> bool:
    """Whether the rows of each shard are whole blocks, too."""
    size = sum(span.size for span in linear.sharding.base_spans(base)) // base.mode.sp
    return base.mode.sp % 2 == 0 and not any(size % step for step in _stacked_parameters(linear).values())


def _cuts_in_pairs(linear: Linear, base: Place) -> bool:
    """Whether two neighbouring shards of the base slice have the same rows, in order and without gaps."""
    shards, (part, *others) = base.mode.sp, linear.sharding.parts
    if shards % 2 or others:
        return False
    stored = linear.sharding.base_spans(base)
    size, start, first = sum(span.size for span in stored) // (shards // 2), stored[0].start, base.weight_index * shards
    if any(edge % step for step in _stacked_parameters(linear).values() for edge in (size, start)):
        return False
    return first % 2 == 0 and all(
        part.span(first + i, base.world_size) == Span(start + i // 2 * size, start + (i // 2 + 1) * size)
        for i in range(shards)
    )


def _paired(parameters: Sequence[nn.Parameter], sizes: Sequence[int], pairs: int, tail: torch.Size) -> torch.Tensor:
    """[pairs, rows, ...]: half of the query, key, value, the other half. The parameters become views."""
    (query, key, value), half = (each.detach() for each in parameters), sizes[0] // 2
    halves = query.reshape(pairs, 2, half, *tail)
    others = [each.reshape(pairs, size, *tail) for each, size in zip((key, value), sizes[1:], strict=True)]
    whole = torch.cat([halves[:, 0], *others, halves[:, 1]], dim=1)
    rows = whole.unfold(1, half, half + sum(sizes[1:]))  # [pairs, 2, ..., half]
    parameters[0].data = rows.movedim(-1, 2)
    _, parameters[1].data, parameters[2].data, _ = whole.split((half, *sizes[1:], half), dim=1)
    return whole


def _shares_memory(parameter: torch.Tensor, whole: torch.Tensor) -> bool:
    return parameter.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _is_released(parameter: torch.Tensor) -> bool:
    """Whether its memory is released because the engine sleeps: all strides are then 0."""
    return parameter.numel() > 1 and not any(parameter.stride())
