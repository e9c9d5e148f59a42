"""New weights that arrive tensor by tensor from another process, of which a rank keeps only its own slices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ulysses_infer.errors import CheckpointError
from ulysses_infer.model.loading.files import take
from ulysses_infer.parallel.layout import Span

Shapes = Mapping[str, tuple[int, ...]]
Kept = tuple[int, list[Span]] | None
"""A dimension and the spans of it that a rank reads; None: the whole tensor."""


class NamedShapes:
    """The names and shapes of a `TensorSource`."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = dict(shapes)

    def keys(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._shapes.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._shapes[key]


class ReadRecorder(NamedShapes):
    """A `TensorSource` without values that remembers what a loader reads."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.reads: dict[str, list[Kept]] = defaultdict(list)

    def read(self, key: str, kept: Kept) -> torch.Tensor:
        """A tensor on the meta device."""
        self.reads[key].append(kept)
        return take(torch.empty(self._shapes[key], device="meta"), kept)


class StagedWeights(NamedShapes):
    """A `TensorSource` of the tensors that have arrived."""

    def __init__(self) -> None:
        super().__init__({})
        self._parts: dict[str, dict[str, torch.Tensor]] = {}

    def read(self, key: str, kept: Kept) -> torch.Tensor:
        """The tensor, or the spans of one dimension, joined."""
        parts = self._parts[key]
        found = parts.get(str(kept))
        return take(parts[str(None)], kept) if found is None else found

    def add(self, name: str, tensor: torch.Tensor, reads: Mapping[str, list[Kept]] | None) -> None:
        """Keep what will be read of a tensor, which the caller may overwrite. reads: None if that is unknown."""
        self._shapes[name] = tuple(tensor.shape)
        wanted: list[Kept] = [None] if reads is None else reads.get(name, [])
        self._parts[name] = {str(kept): take(tensor, kept).clone() for kept in wanted}


@dataclass
class WeightTransfer:
    """A rank's end of a transfer of weights from a trainer."""

    group: Any = None
    """The process group with the trainer, which is its rank 0; None before it was joined."""
    staged: StagedWeights | None = None
    """What has arrived since the update was started; None between updates."""

    def begun(self) -> StagedWeights:
        """The weights of the update in progress. Raises `CheckpointError` if none was started."""
        if self.staged is None:
            raise CheckpointError("no weight update is in progress; call start_weight_update first")
        return self.staged
