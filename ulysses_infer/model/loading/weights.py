"""Weights: one rank's weights, which can be updated or freed while the engine runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ulysses_infer.errors import CheckpointError
from ulysses_infer.model.loading.checkpoint import Loader
from ulysses_infer.model.loading.files import TensorSource
from ulysses_infer.model.loading.sources import ShapesOnly
from ulysses_infer.model.loading.staging import Kept, ReadRecorder, Shapes
from ulysses_infer.model.model import ModelBuilder, ShiftModel


class _ShapeCheckLoader(Loader):
    """Runs a complete load without writing, to check names and shapes."""

    def store(self, name: str, current: torch.Tensor, tensor: torch.Tensor) -> None:
        """Do nothing."""


class _InPlaceLoader(Loader):
    """Updates parameters in place, so that the views of every mode see the new values."""

    def store(self, name: str, current: torch.Tensor, tensor: torch.Tensor) -> None:
        """Copy, and cast, `tensor` into `current`."""
        current.copy_(tensor)


class Weights:
    """One rank's weights, which can be updated or freed while the engine runs."""

    def __init__(self, blueprint: ModelBuilder, model: ShiftModel, are_borrowed: bool) -> None:
        """`are_borrowed`: the weights may share memory with the caller's model."""
        self._blueprint, self._model = blueprint, model
        self._are_own = not are_borrowed

    def open_source(self) -> TensorSource:
        """The tensors that the weights were loaded from."""
        return self._blueprint.open_source()

    def check(self, source: TensorSource) -> None:
        """Raise `CheckpointError` unless `source` has a tensor of the right shape for every parameter."""
        self._blueprint.loader(ShapesOnly(source), _ShapeCheckLoader).load()

    def reads_of(self, shapes: Shapes) -> Mapping[str, list[Kept]] | None:
        """What this rank reads of each tensor of a checkpoint; None if `shapes` are not those of a whole one."""
        recorder = ReadRecorder(shapes)
        try:
            self._blueprint.loader(recorder, _ShapeCheckLoader).load()
        except CheckpointError:
            return None
        return recorder.reads

    @torch.no_grad()
    def write(self, source: TensorSource) -> None:
        """Load the values of `source`. Collective if `source` gathers partitioned parameters."""
        if not self._are_own:
            self._move({id(p): torch.empty_like(p, memory_format=torch.contiguous_format) for p in self._parameters()})
        self._blueprint.loader(source, _InPlaceLoader).load()
        self._are_own = True

    @torch.no_grad()
    def drop(self) -> None:
        """Free the memory; `write` allocates it again."""
        self._move({id(p): p.new_zeros(()).expand(p.shape) for p in self._parameters()})
        self._are_own = False

    def _parameters(self) -> list[Any]:
        return list(self._model.module.parameters())

    def _move(self, places: dict[int, torch.Tensor]) -> None:
        for parameter in self._parameters():
            parameter.data = places[id(parameter)]
        self._model.rebind()
