"""`QuantizedLinear`: one stored slice of a quantized linear layer, viewed differently in each mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ulysses_infer.kernels.scaled_rows import NONE, QuantisedRows
from ulysses_infer.model.context import step_context
from ulysses_infer.model.layers.linear import Cut, features_of
from ulysses_infer.model.loading.files import TensorSource
from ulysses_infer.model.quantization.component import Axis, Component
from ulysses_infer.model.quantization.native_products import segment_of
from ulysses_infer.model.quantization.online import OnlineScheme, OnlineWeight
from ulysses_infer.model.quantization.products import Piece, Product, choose_product
from ulysses_infer.model.quantization.reading import check_foreign, read_part
from ulysses_infer.model.quantization.scheme import Scheme
from ulysses_infer.parallel.layout import Mode, Place, Span
from ulysses_infer.parallel.sharding import Sharding, merge


class QuantizedLinear(nn.Module):
    """A `ShiftLinear` whose weight stays quantised: the same cuts, the same views of one stored base slice.

    Its parameters are the tensors of the checkpoint, under their names there. Where a slice begins or ends inside a
    block or a packed word, that block's scale or that word is kept whole, by both neighbours.
    """

    def __init__(self, source: Any, scheme: Scheme, cut: Cut, sharding: Sharding, base: Place) -> None:
        super().__init__()
        self.scheme, self.cut, self.sharding, self.base = scheme, cut, sharding, base
        self.out_features, self.in_features = features_of(source)
        self._is_transposed = type(source) is not nn.Linear  # only of dense weights
        self._spans = sharding.base_spans(base)
        self._components = dict(scheme.components(self.out_features, self.in_features))
        for name, component in self._components.items():
            empty = source.weight.new_empty(component.stored_shape(cut, self._spans), dtype=component.dtype)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.bias: nn.Parameter | None = None
        if source.bias is not None:
            size = sum(span.size for span in self._spans) if cut == "column" else self.out_features
            self.bias = nn.Parameter(source.bias.new_empty(size), requires_grad=False)
        self._products: list[tuple[Product, Piece]] = []
        self._part_sizes: list[int] = []
        self._views: dict[Mode, tuple[list[tuple[Product, Piece]], list[int]]] = {}
        self.is_stacked = False
        """Whether its weight is part of a stacked weight (`fusion/stacked.py`)."""

    # -- loading -----------------------------------------------------------------------------------------------

    def slices(self, name: str) -> tuple[int, list[Span]] | None:
        """Which part of the full tensor `name` this rank stores: (dimension, spans); None for all of it."""
        if name == "bias":
            return None if self.cut == "row" else (0, self._spans)
        return self._components[name].kept(self.cut, self._spans)

    def _component(self, name: str) -> Component:
        if name != "bias":
            return self._components[name]
        return Component((self.out_features,), self.get_parameter(name).dtype, outputs=Axis(0))

    def read(self, name: str, source: TensorSource, key: str) -> torch.Tensor:
        """This rank's part of the tensor `name`, called `key` in `source`. Raises `CheckpointError`."""
        component = self._component(name)
        return read_part(component, source, key, self.slices(name), component.stored_shape(self.cut, self._spans))

    def check_foreign(self, name: str, source: TensorSource, key: str) -> None:
        """Check a checkpoint tensor that this layer does not use, for example zero points of a symmetric scheme.

        Raises `CheckpointError` unless it is known to be unnecessary or is all zeros.
        """
        if name not in self.scheme.ignored:
            check_foreign(key, source, ", ".join(self._components))

    @property
    def online(self) -> OnlineWeight | None:
        """How its tensors are made from a dense weight; None if the checkpoint has them."""
        if not isinstance(self.scheme, OnlineScheme):
            return None
        components, outputs = self._components, self.out_features
        return OnlineWeight(self.scheme, components, self.cut, self._spans, outputs, self._is_transposed)

    # -- running -----------------------------------------------------------------------------------------------

    @property
    def components(self) -> Mapping[str, Component]:
        """The tensors of the whole layer."""
        return self._components

    @property
    def input_kind(self) -> int:
        """How it quantises its inputs (kernels/scaled_rows.py); it takes them quantised, too."""
        kinds = {product.input_kind for product, _ in self._products}
        return kinds.pop() if len(kinds) == 1 else NONE

    def bind(self, place: Place) -> None:
        """Read the weight as `place` needs it from now on. Views only; nothing is copied."""
        if self.is_stacked:
            self._products = []
            return
        if place.mode not in self._views:
            spans = self.sharding.spans(place.weight_index, place.mode.tp)
            pieces = [self._piece(span) for span in merge(spans)]
            products = [(choose_product(self.scheme, piece), piece) for piece in pieces]
            self._views[place.mode] = products, [span.size for span in spans]
        self._products, self._part_sizes = self._views[place.mode]

    def forget_views(self) -> None:
        """See `ShiftLinear.forget_views`."""
        self._views.clear()

    def _piece(self, span: Span) -> Piece:
        """The features `span`, which lie inside one of the stored spans."""
        parts = {
            name: component.view(self.get_parameter(name).detach(), self.cut, self._spans, span)
            for name, component in self._components.items()
        }
        if self.cut == "row":
            segment = segment_of(self.cut, self.sharding, self.base.world_size)
            return Piece(Span(0, self.out_features), span, self._components, parts, None, segment)
        return Piece(span, Span(0, self.in_features), self._components, parts, self._bias(span))

    def _bias(self, span: Span) -> torch.Tensor | None:
        if self.bias is None:
            return None
        return self._component("bias").view(self.bias.detach(), "column", self._spans, span)

    def reader(self, place: Place) -> Callable[[torch.dtype], torch.Tensor]:
        """Returns the weight of a column-parallel layer as one piece for `place`, [out / tp, in], dequantized at each
        call."""
        (span,) = merge(self.sharding.spans(place.weight_index, place.mode.tp))
        piece = self._piece(span)
        return lambda dtype: self.scheme.dequantise(piece.parts, piece.rows, piece.columns).to(dtype)

    def forward(self, inputs: torch.Tensor | QuantisedRows) -> torch.Tensor:
        """inputs: [..., in features of the mode]; returns [..., out features of the mode]."""
        if self.cut == "row":
            output = step_context().collectives.sum_over_tp(self.partial(inputs))
            return output if self.bias is None else output.add_(self.bias)
        outputs = [product(inputs, piece) for product, piece in self._products]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def dense_parts(self) -> Sequence[torch.Tensor]:
        """See `ShiftLinear.dense_parts`."""
        return []

    def dense_row(self) -> torch.Tensor | None:
        """See `ShiftLinear.dense_row`."""
        return None

    @property
    def has_partial(self) -> bool:
        """See `ShiftLinear.has_partial`."""
        return self.cut == "row" and self.bias is None and not self._forward_hooks

    def partial(self, inputs: torch.Tensor | QuantisedRows) -> torch.Tensor:
        """See `ShiftLinear.partial`."""
        ((product, piece),) = self._products
        return product(inputs, piece)

    def parts(self, inputs: torch.Tensor | QuantisedRows) -> Sequence[torch.Tensor]:
        """The result of `forward` of a column-parallel layer, split by the parts of the sharding."""
        return self.forward(inputs).split(self._part_sizes, dim=-1)

    def shard_parts(self, inputs: torch.Tensor | QuantisedRows) -> Sequence[torch.Tensor]:
        """`parts` as [..., 1, features], as `StackedLinears.shard_parts` returns them."""
        return [part.unsqueeze(-2) for part in self.parts(inputs)]
