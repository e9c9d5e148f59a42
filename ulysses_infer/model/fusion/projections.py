"""Helpers for projections that share an input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ulysses_infer.kernels.scaled_rows import NONE, QuantisedRows
from ulysses_infer.model.layers.linear import ShiftLinear
from ulysses_infer.model.layers.matmul import linears
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.native.matmul import Weights

Inputs = torch.Tensor | QuantisedRows


class Projection(Protocol):
    """One or several column-parallel linears."""

    @property
    def input_kind(self) -> int:
        """See `QuantizedLinear.input_kind`."""
        ...

    def shard_parts(self, inputs: Inputs) -> Sequence[torch.Tensor]:
        """inputs: [..., in]; returns the outputs, each [..., shards, out features of a shard], with dense rows.

        The features of the mode are those of one shard after another's.
        """
        ...

    def dense_parts(self) -> Sequence[torch.Tensor]:
        """The weights of each linear in the mode, [shards, out features of a shard, in]; empty if they have biases or
        are not dense."""
        ...


def project(projections: Sequence[Projection], inputs: Inputs) -> list[torch.Tensor]:
    """The outputs of all `projections` of `inputs`, in order: each [..., shards, out features of a shard]."""
    weights = _dense_weights(projections)
    if weights and isinstance(inputs, torch.Tensor):
        return [part.unsqueeze(-2) for part in linears(inputs, weights)]
    return [part for projection in projections for part in projection.shard_parts(inputs)]


def _dense_weights(projections: Sequence[Projection]) -> list[Weights]:
    """The weights of all outputs if all are dense and stored by themselves, else none."""
    found: list[Weights] = []
    for each in projections:
        weights = each.part_weights() if isinstance(each, ShiftLinear) else ()
        if not weights:
            return []
        found += weights
    return found


def common_input_kind(projections: Iterable[Projection]) -> int:
    """How all `projections` quantise their inputs; NONE if they differ."""
    kinds = {projection.input_kind for projection in projections}
    return kinds.pop() if len(kinds) == 1 else NONE


def input_kind(module: nn.Module | None) -> int:
    """How `module` takes its inputs quantised; NONE if it does not."""
    return getattr(module, "input_kind", NONE)


def flat(inputs: Inputs) -> Inputs:
    """[..., D] as [rows, D]."""
    return inputs.flat() if isinstance(inputs, QuantisedRows) else inputs.flatten(0, -2)


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
