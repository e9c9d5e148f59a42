"""What plans of kernels on the host need: arrays in pinned memory, and an event per plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch


class Event(Protocol):
    """A point in the GPU's work, as `torch.cuda.Event`."""

    def record(self) -> None:
        """The point is after all work so far."""
        ...

    def synchronize(self) -> None:
        """Wait until the GPU has reached the point."""
        ...


class HostArrays:
    """Makes tensors of arrays of whole numbers. A GPU's host has them pinned, so that their copies do not wait.

    Torch reuses pinned memory only after the copies from it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def on_host(self, array: np.ndarray, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """`array` in memory of its own."""
        tensor = torch.empty(array.shape, dtype=dtype, pin_memory=self._device.type == "cuda")
        tensor.numpy()[...] = array
        return tensor

    def on_device(self, array: np.ndarray, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """`array` on the device, where it is when the work launched so far is done."""
        return self.on_host(array, dtype).to(self._device, non_blocking=True)


class PlanOrder:
    """Runs plans. A wrapper copies all its plans from one pinned buffer, so the last copy must finish first."""

    def __init__(self, make_event: Callable[[], Event] | None) -> None:
        """make_event: None if the device is no GPU."""
        self._make_event = make_event
        self._copied: dict[Any, Event] = {}

    @classmethod
    def on(cls, device: torch.device) -> PlanOrder:
        """For wrappers of `device`."""
        return cls(torch.cuda.Event if device.type == "cuda" else None)

    def run(self, wrapper: Any, plan: Callable[[], None]) -> None:
        """Call `plan`, which plans `wrapper`."""
        event = self._copied.get(wrapper)
        if event is not None:
            event.synchronize()
        plan()
        if event is None and self._make_event is not None:
            event = self._copied[wrapper] = self._make_event()
        if event is not None:
            event.record()
