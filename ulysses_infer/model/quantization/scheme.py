"""The interface of quantization schemes of a linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from ulysses_infer.model.quantization.component import Component
from ulysses_infer.parallel.layout import Span

MARK = "quantization_scheme"  # an attribute of linear layers, which are replaced by layers that keep it


class Scheme(Protocol):
    """How one linear layer's weight is stored. Without state: tensors are given."""

    @property
    def ignored(self) -> frozenset[str]:
        """Names of tensors beside the layer's that are not needed, whatever they hold."""
        ...

    def components(self, outputs: int, inputs: int) -> dict[str, Component]:
        """The tensors of a layer of that many features, by their names in the checkpoint. Raises
        `UnsupportedModelError` for sizes that cannot be stored so."""
        ...

    def dequantise(self, parts: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> torch.Tensor:
        """The weight [rows, columns] in float32: outputs `rows`, inputs `columns` of the whole layer.

        parts: of each component, the indices that cover both spans.
        """
        ...
