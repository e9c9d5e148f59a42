"""The weights of one rank, which can be replaced while the engine lives."""

from __future__ import annotations

from typing import Any

import torch

from ulysses_infer.model.loading.checkpoint import Loader
from ulysses_infer.model.loading.files import TensorSource
from ulysses_infer.model.loading.sources import ShapesOnly
from ulysses_infer.model.model import ModelBuilder, ShiftModel


class _Checker(Loader):
    """Goes through a whole loading and writes nothing."""

    def store(self, name: str, current: torch.Tensor, tensor: torch.Tensor) -> None:
        """Nothing: that it came this far is what was to be known."""


class _Rewriter(Loader):
    """Gives parameters new values where they are, so that every mode's views see them."""

    def store(self, name: str, current: torch.Tensor, tensor: torch.Tensor) -> None:
        """Copy, and cast, `tensor` into `current`."""
        current.copy_(tensor)


class Weights:
    """One rank's weights, which may be written again or dropped while the engine lives."""

    def __init__(self, blueprint: ModelBuilder, model: ShiftModel, are_borrowed: bool) -> None:
        """`are_borrowed`: some may share the memory of a model that the caller has."""
        self._blueprint, self._model = blueprint, model
        self._are_own = not are_borrowed

    def check(self, source: TensorSource) -> None:
        """Raise `CheckpointError` unless `source` has a tensor of the right shape for every parameter."""
        self._blueprint.loader(ShapesOnly(source), _Checker).load()

    @torch.no_grad()
    def write(self, source: TensorSource) -> None:
        """Take the values of `source`. Collective if it gathers."""
        if not self._are_own:
            self._move({id(p): torch.empty_like(p, memory_format=torch.contiguous_format) for p in self._parameters()})
        self._blueprint.loader(source, _Rewriter).load()
        self._are_own = True

    @torch.no_grad()
    def drop(self) -> None:
        """Give the memory back; `write` takes it again."""
        self._move({id(p): p.new_zeros(()).expand(p.shape) for p in self._parameters()})
        self._are_own = False

    def _parameters(self) -> list[Any]:
        return list(self._model.module.parameters())

    def _move(self, places: dict[int, torch.Tensor]) -> None:
        for parameter in self._parameters():
            parameter.data = places[id(parameter)]
        self._model.rebind()
