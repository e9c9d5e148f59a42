"""The states of a recurrent layer, in the form in which transformers' layers ask a cache for them."""

from __future__ import annotations

from typing import Any

import torch

from ulysses_infer.cache.states import CONVOLUTION, RECURRENT, StateCache, StateShape

Key = tuple[str, int]
"""Kind and number of a state within its layer."""


class LayerStates:
    """The states of some sequences in one layer, with the methods that transformers' layers call on a cache.

    Layers may update what `get_...` returns in place. `store` keeps all changes.
    """

    def __init__(self, cache: StateCache, layer: int, slots: torch.Tensor) -> None:
        self._cache, self._layer, self._slots = cache, layer, slots
        self._states: dict[Key, torch.Tensor] = {}

    def state(self, kind: str, index: int = 0) -> torch.Tensor:
        """A state before the step, [n, *shape]."""
        key = kind, index
        if key not in self._states:
            self._states[key] = self._cache.get(self._layer, kind, index, self._slots)
        return self._states[key]

    def store(self) -> None:
        """Write the states back to their slots."""
        for (kind, index), value in self._states.items():
            self._cache.put(self._layer, kind, index, self._slots, value)

    def set(self, kind: str, value: torch.Tensor, index: int = 0) -> None:
        """The state after the step, [n, *shape]."""
        self._states[kind, index] = value

    # -- what transformers calls -------------------------------------------------------------------------------

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        """The last inputs of the convolution, [n, channels, kernel]."""
        return self.state(CONVOLUTION, state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """conv_states: [n, channels, L], the inputs of the step; returns them after those of the state."""
        before = self.state(CONVOLUTION, state_idx)
        joined = torch.cat((before, conv_states), dim=-1)
        self.set(CONVOLUTION, joined[..., -before.shape[-1] :], state_idx)
        return joined

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        """The recurrent state, [n, *shape]."""
        return self.state(RECURRENT, state_idx)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """recurrent_states: after the step, [n, *shape]."""
        self.set(RECURRENT, recurrent_states, state_idx)
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether states before the last ones are kept: never."""
        return False


class RecordedStates:
    """Finds the shapes of a layer's states: a cache without any, which notes what the layer puts into it."""

    def __init__(self, layer: int) -> None:
        self._layer, self.shapes = layer, list[StateShape]()

    def state(self, kind: str, index: int = 0) -> None:
        """There is none yet."""

    def set(self, kind: str, value: torch.Tensor, index: int = 0) -> None:
        """Note the shape of `value` [n, *shape]."""
        self.shapes.append(StateShape(self._layer, kind, index, tuple(value.shape[1:]), value.dtype))

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """See `state`."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """See `state`."""

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int
    ) -> torch.Tensor:
        """conv_states: [n, channels, L]."""
        self.set(CONVOLUTION, conv_states.new_empty((*conv_states.shape[:-1], conv_kernel_size)), state_idx)
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """recurrent_states: [n, *shape]."""
        self.set(RECURRENT, recurrent_states, state_idx)
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        """See `LayerStates.is_recording_past`."""
        return False
