"""The interface of quantization schemes of a linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from ulysses_infer.kernels.experts_weights import StoredExperts
from ulysses_infer.model.quantization.component import Component
from ulysses_infer.parallel.layout import Span

MARK = "quantization_scheme"  # attribute of linear layers that are replaced by quantized ones


class Scheme(Protocol):
    """How the weight of one linear layer is stored. Stateless: tensors are passed in."""

    @property
    def ignored(self) -> frozenset[str]:
        """Names of tensors next to the layer's own that are not needed."""
        ...

    def components(self, outputs: int, inputs: int) -> dict[str, Component]:
        """The tensors of a layer of this size, by their names in the checkpoint. Raises `UnsupportedModelError` for
        sizes that cannot be stored."""
        ...

    def dequantise(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> torch.Tensor:
        """The weight [rows, columns] in float32: outputs `rows`, inputs `columns` of the whole layer.

        parts: the indices of each component that cover both spans.
        """
        ...

    def stored_experts(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> StoredExperts:
        """The same slice of all experts without dequantising: parts: as for `dequantise`, behind a first dimension."""
        ...
