"""The states of recurrent layers on one rank: of its own heads and channels, the same in every mode.

Unlike keys and values, the state of a sequence has a fixed size: each running sequence has one slot. Further slots hold
snapshots, which later requests with the same prefix start from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ulysses_infer.arithmetic import round_up

ALIGNMENT = 64  # bytes; each state of a slot starts at a multiple of it
CONVOLUTION, RECURRENT = "conv", "recurrent"


@dataclass(frozen=True)
class StateShape:
    """One state of one layer on this rank."""

    layer: int
    kind: str
    """`CONVOLUTION` (the last inputs of a short convolution) or `RECURRENT`."""
    index: int
    """Number of the state among those of its kind in the layer."""
    shape: tuple[int, ...]
    """Of one sequence."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes per sequence."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: what is derived from it is kept
class StateSequences:
    """The sequences of a step, in batch order, for layers with states."""

    slots: torch.Tensor
    """[num_sequences] int64, on the device: the slot of each sequence."""
    query_lens: Sequence[int]
    """Tokens of each sequence in the step."""


def slot_bytes(shapes: Sequence[StateShape]) -> int:
    """Bytes of one slot: the states of one sequence in all layers."""
    return sum(round_up(shape.num_bytes, ALIGNMENT) for shape in shapes)


class StateCache:
    """Slots of states. A slot of zeros is the state before the first token.

    The states of a slot are contiguous, so that a slot is cleared or copied by one operation.
    """

    def __init__(
        self,
        shapes: Sequence[StateShape],
        num_sequences: int,
        device: torch.device,
        num_snapshots: int = 0,
        scratch_slots: int = 0,
    ) -> None:
        """Slots for running sequences, then scratch slots for padding rows, then snapshots."""
        self.shapes, self.device = tuple(shapes), device
        self.num_sequences, self.num_snapshots = num_sequences, num_snapshots
        self.first_snapshot = num_sequences + scratch_slots
        self.num_slots = self.first_snapshot + num_snapshots
        self.num_bytes_per_slot = slot_bytes(self.shapes)
        self.take()

    def take(self) -> None:
        """Allocate the memory; its content is undefined."""
        # Not touched before it is written: on a CPU, pages are allocated when slots are first used.
        size = self.num_slots, self.num_bytes_per_slot
        self._memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._states: dict[tuple[int, str, int], torch.Tensor] = {}
        start = 0
        for shape in self.shapes:
            state = self._memory[:, start : start + shape.num_bytes].view(shape.dtype)
            self._states[shape.layer, shape.kind, shape.index] = state.unflatten(1, shape.shape)
            start += round_up(shape.num_bytes, ALIGNMENT)

    def release(self) -> None:
        """Free the memory, until `take`."""
        self._memory, self._states = torch.empty(0, dtype=torch.uint8), {}

    @property
    def memory(self) -> torch.Tensor:
        """All states: [num_slots, num_bytes_per_slot] uint8."""
        return self._memory

    @property
    def scratch_slot(self) -> int:
        """The first scratch slot."""
        assert self.first_snapshot > self.num_sequences
        return self.num_sequences

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return self.num_slots * self.num_bytes_per_slot

    def state(self, layer: int, kind: str, index: int = 0) -> torch.Tensor:
        """A state of all slots: [num_slots, *shape], contiguous per slot. Kernels update it in place."""
        return self._states[layer, kind, index]

    def get(self, layer: int, kind: str, index: int, slots: torch.Tensor) -> torch.Tensor:
        """A copy of the states in `slots` [n] int64: [n, *shape]."""
        return self.state(layer, kind, index).index_select(0, slots)

    def put(self, layer: int, kind: str, index: int, slots: torch.Tensor, value: torch.Tensor) -> None:
        """Store `value` [n, *shape] in `slots` [n] int64, which are distinct."""
        state = self.state(layer, kind, index)
        state.index_copy_(0, slots, value.to(state.dtype))

    def clear(self, slots: torch.Tensor) -> None:
        """Set `slots` [n] int64 to the state before the first token, in all layers."""
        self._memory.index_fill_(0, slots, 0)

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy the slots `sources` [n] to `targets` [n], both int64, in all layers."""
        self._memory.index_copy_(0, targets, self._memory.index_select(0, sources))
