"""Helpers for projections that share an input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ulysses_infer.model.layers.linear import ShiftLinear
from ulysses_infer.model.quantization.linear import QuantizedLinear


class Projection(Protocol):
    """One or several column-parallel linears."""

    def parts(self, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """inputs: [..., in]; returns the outputs, each [..., out features of the mode]."""
        ...


def project(projections: Iterable[Projection], inputs: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of all `projections` of `inputs`, in order."""
    return [part for projection in projections for part in projection.parts(inputs)]


def find_linears(module: nn.Module, forms: tuple[tuple[str, ...], ...]) -> list[Any]:
    """The sharded linears of `module` for the first tuple of names in `forms` that it has completely; [] if none."""
    children = dict(module.named_children())
    for names in forms:
        found = [children.get(name) for name in names]
        if all(isinstance(child, ShiftLinear | QuantizedLinear) for child in found):
            return found
    return []


def children_with_weights(module: nn.Module) -> dict[str, nn.Module]:
    """The children of `module` with weights, by name."""
    return {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}


def has_own_weights(module: nn.Module) -> bool:
    """Whether `module` has weights that are not in its children."""
    return any(True for _ in module.parameters(recurse=False))
