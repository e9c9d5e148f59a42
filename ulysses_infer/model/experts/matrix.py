"""One quantized matrix of all stored experts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ulysses_infer.errors import CheckpointError
from ulysses_infer.kernels.experts_weights import StoredExperts
from ulysses_infer.kernels.launch import runs_products
from ulysses_infer.model.layers.linear import Cut
from ulysses_infer.model.loading.files import TensorSource
from ulysses_infer.model.quantization.grouped import (
    TokenGroups,
    grouped_product,
    is_grouped,
    stored_product,
)
from ulysses_infer.model.quantization.native_products import native_weights, segment_of
from ulysses_infer.model.quantization.online import OnlineExperts, OnlineScheme, OnlineWeight
from ulysses_infer.model.quantization.products import Piece, choose_product
from ulysses_infer.model.quantization.reading import check_foreign, read_part
from ulysses_infer.model.quantization.scaled import ScaledWeight
from ulysses_infer.model.quantization.scheme import Scheme
from ulysses_infer.parallel.layout import Place, Span
from ulysses_infer.parallel.sharding import Sharding, merge


class ExpertMatrix(nn.Module):
    """What `QuantizedLinear` is to a layer, this is to one projection of all of a layer's experts.

    Its parameters are the tensors of the checkpoint, those of one expert after another's in a first dimension; each
    is cut as a linear layer's would be, and blocks and words that a cut goes through are kept by both neighbours.
    """

    def __init__(
        self,
        scheme: Scheme,
        sizes: tuple[int, int],
        cut: Cut,
        sharding: Sharding,
        num_experts: int,
        own: Span,
        base: Place,
        device: torch.device,
    ) -> None:
        """sizes: (outputs, inputs) of one expert's whole matrix; own: the experts that this rank stores."""
        super().__init__()
        self.scheme, self.sizes, self.cut, self.sharding = scheme, sizes, cut, sharding
        self.num_experts, self.own, self._spans = num_experts, own, sharding.base_spans(base)
        self._components = dict(scheme.components(*sizes))
        for name, component in self._components.items():
            shape = (own.size, *component.stored_shape(cut, self._spans))
            empty = torch.empty(shape, dtype=component.dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self._segment = segment_of(cut, sharding, base.world_size)
        self.is_transposed = False
        """Whether the dense weight that it is made of while loading, if any, is [in, out]."""
        self._pieces: list[tuple[Span, Span, dict[str, torch.Tensor]]] = []
        self._part_spans: list[Span] = []

    # -- loading -----------------------------------------------------------------------------------------------

    def read(self, name: str, source: TensorSource, keys: Mapping[int, str]) -> torch.Tensor:
        """This rank's part of the component `name`, one tensor per expert in `source`, `keys` by number.

        Raises `CheckpointError`. At most one expert's part is held in addition to the result.
        """
        if sorted(keys) != list(range(self.num_experts)):
            raise CheckpointError(
                f"the checkpoint has {len(keys)} tensors like {next(iter(keys.values()))}, but the model's config "
                f"makes it {self.num_experts} experts; it is incomplete, or the weights do not belong to this "
                "config.json"
            )
        component, parameter = self._components[name], self.get_parameter(name)
        kept, whole = component.kept(self.cut, self._spans), torch.empty(0)
        for place, expert in enumerate(range(*self.own)):
            part = read_part(component, source, keys[expert], kept, tuple(parameter.shape[1:]))
            if place == 0:
                whole = torch.empty(parameter.shape, dtype=component.dtype, device=part.device)
            whole[place] = part
        return whole if self.own.size else torch.empty(parameter.shape, dtype=component.dtype)

    def read_merged(self, name: str, source: TensorSource, key: str) -> torch.Tensor:
        """This rank's part of the component `name`, one tensor `key` for all experts in `source`.

        A rank stores whole experts, or a slice of every expert.
        """
        component = self._components[name].stacked(self.num_experts)
        kept = component.kept(self.cut, self._spans)
        if self.own.size < self.num_experts:
            kept = 0, [self.own]
        return read_part(component, source, key, kept, tuple(self.get_parameter(name).shape))

    def check_foreign(self, name: str, source: TensorSource, key: str) -> None:
        """See `QuantizedLinear.check_foreign`."""
        if name not in self.scheme.ignored:
            check_foreign(key, source, ", ".join(self._components))

    @property
    def online(self) -> OnlineExperts | None:
        """How its tensors are made from dense weights; None if the checkpoint has them."""
        if not isinstance(self.scheme, OnlineScheme):
            return None
        components, outputs = self._components, self.sizes[0]
        weight = OnlineWeight(self.scheme, components, self.cut, self._spans, outputs, self.is_transposed)
        return OnlineExperts(weight, self.own, self.own.size < self.num_experts)

    # -- running -----------------------------------------------------------------------------------------------

    def bind(self, place: Place) -> None:
        """Read the weights as `place` needs them from now on. Views only; nothing is copied."""
        self._part_spans = self.sharding.spans(place.weight_index, place.mode.tp)
        self._pieces = [self._piece(span) for span in merge(self._part_spans)]

    def _piece(self, span: Span) -> tuple[Span, Span, dict[str, torch.Tensor]]:
        """Outputs, inputs and components of the features `span`."""
        outputs, inputs = (Span(0, size) for size in self.sizes)
        return (span, inputs, self._views(span)) if self.cut == "column" else (outputs, span, self._views(span))

    def stored_parts(self) -> list[StoredExperts | None]:
        """Each part of the matrix, gate and up if it is both, as our kernel reads it; None: torch has a product."""
        return [self._stored_part(*self._piece(span)) for span in self._part_spans]

    def _stored_part(self, rows: Span, columns: Span, views: dict[str, torch.Tensor]) -> StoredExperts | None:
        if isinstance(self.scheme, ScaledWeight) and is_grouped(self.scheme, views):
            return None
        return self.scheme.stored_experts(views, rows, columns)

    def _views(self, span: Span) -> dict[str, torch.Tensor]:
        """For all own experts, what covers the features `span`."""
        stacked = {name: component.stacked(self.num_experts) for name, component in self._components.items()}
        return {
            name: component.view(self.get_parameter(name).detach(), self.cut, self._spans, span)
            for name, component in stacked.items()
        }

    def forward(self, tokens: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
        """tokens: [S, inputs of the mode], sorted by expert; returns [S, outputs of the mode].

        Rows after the last own expert's are not written.
        """
        outputs = [self._product(tokens, groups, *piece) for piece in self._pieces]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _product(
        self, tokens: torch.Tensor, groups: TokenGroups, rows: Span, columns: Span, views: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Of all experts at once where the device can; else the host needs the groups' sizes."""
        if isinstance(self.scheme, ScaledWeight) and is_grouped(self.scheme, views):
            return grouped_product(tokens, groups, self.scheme, views)
        if runs_products(tokens.device):
            return stored_product(tokens, groups, self.scheme.stored_experts(views, rows, columns))
        if tokens.device.type == "cpu" and rows.size and self.own.size:
            native = native_weights(self.scheme.stored_experts(views, rows, columns), self._segment)
            if native is not None and native.serves(tokens):
                return native.experts_product(tokens, groups.offsets)
        return self._one_by_one(tokens, groups, rows, columns, views)

    def _one_by_one(
        self, tokens: torch.Tensor, groups: TokenGroups, rows: Span, columns: Span, views: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Experts without tokens are not read."""
        output = tokens.new_empty(len(tokens), rows.size)
        for expert, (start, end) in enumerate(pairwise((0, *groups.ends))):
            if end > start:
                parts = {name: view[expert] for name, view in views.items()}
                piece = Piece(rows, columns, self._components, parts, None, self._segment)
                output[start:end] = choose_product(self.scheme, piece)(tokens[start:end], piece)
        return output


def matrices_of(module: Any) -> dict[str, ExpertMatrix]:
    """The quantized matrices of an experts module by name; empty if it is not quantized."""
    return {name: child for name, child in module.named_children() if isinstance(child, ExpertMatrix)}
