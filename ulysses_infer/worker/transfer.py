"""Transfers between host and device that neither side waits for: a step's inputs, and its tokens on the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ulysses_infer.arithmetic import round_up

ALIGNMENT = 16  # bytes; every field starts at a multiple of it
DEPTH = 2  # buffers: one is written while the other is still being copied


class StepInputs(Protocol):
    """Transfers the host arrays of a step to the device."""

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The arrays as tensors on the device, of the same shapes and types, valid until the next `send`."""
        ...


class DirectInputs:
    """For a CPU: the tensors share the arrays' memory."""

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """See `StepInputs.send`."""
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


class PackedInputs:
    """For a GPU: all arrays packed into one pinned buffer and copied once per step, on the stream of the kernels."""

    def __init__(self, device: torch.device) -> None:
        self._buffers = [_Buffer(device) for _ in range(DEPTH)]
        self._index = 0

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """See `StepInputs.send`."""
        self._index = (self._index + 1) % DEPTH
        return self._buffers[self._index].send(arrays)


class _Buffer:
    """Pinned and device memory of one step's inputs, and the event after which the pinned memory may be rewritten."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host = self._on_device = torch.empty(0, dtype=torch.uint8)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        starts = _starts(arrays)
        if self._copied is not None:
            self._copied.synchronize()  # the copy of DEPTH steps ago
        self._reserve(starts[-1])
        host = self._host.numpy()
        for start, array in zip(starts, arrays, strict=False):
            np.copyto(host[start : start + array.nbytes].view(array.dtype).reshape(array.shape), array)
        used = self._on_device[: starts[-1]]
        used.copy_(self._host[: starts[-1]], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return [_field(used, start, array) for start, array in zip(starts, arrays, strict=False)]

    def _reserve(self, size: int) -> None:
        """Grow to at least `size` bytes, to a power of two."""
        if size > self._host.numel():
            size = 1 << (size - 1).bit_length()
            self._host = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            self._on_device = torch.empty(size, dtype=torch.uint8, device=self.device)


def make_inputs(device: torch.device) -> StepInputs:
    """The transfer for `device`."""
    return DirectInputs() if device.type == "cpu" else PackedInputs(device)


def _starts(arrays: Sequence[np.ndarray]) -> list[int]:
    """The offset of each array in the buffer, then the total size."""
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + round_up(array.nbytes, ALIGNMENT))
    return starts


def _field(buffer: torch.Tensor, start: int, array: np.ndarray) -> torch.Tensor:
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    return buffer[start : start + array.nbytes].view(dtype).view(array.shape)


class DeviceToHostCopy:
    """A copy to the host in progress. Waiting for it does not wait for later work of the device."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._numbers: list[Any] = numbers.tolist()

    def wait(self) -> list[Any]:
        """The numbers, as nested lists of the tensor's shape."""
        if self._event is None:
            return self._numbers
        self._event.synchronize()
        return self._host.tolist()
