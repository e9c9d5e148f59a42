"""A step's numbers on their way to the device: on a GPU packed into one pinned buffer and copied without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

ALIGNMENT = 16  # bytes; every field starts at a multiple
DEPTH = 2  # buffers in turn: one is written while the other is still being copied


class StepInputs(Protocol):
    """Brings the host arrays of a step to the device."""

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The arrays as tensors on the device, of the same shapes and types, valid until the next `send`."""
        ...


class DirectInputs:
    """For a CPU: the tensors are the arrays' own memory."""

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """See `StepInputs.send`."""
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


class PackedInputs:
    """For a GPU: one copy a step, on the stream of the kernels that read it, so that neither side waits."""

    def __init__(self, device: torch.device) -> None:
        self._buffers = [_Buffer(device) for _ in range(DEPTH)]
        self._turn = 0

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """See `StepInputs.send`."""
        self._turn = (self._turn + 1) % DEPTH
        return self._buffers[self._turn].send(arrays)


class _Buffer:
    """Host and device memory of one step's inputs, and the event that says when the host's may be written again."""

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
        """Grow to at least `size` bytes, by doubling, so that it soon never happens again."""
        if size > self._host.numel():
            size = 1 << (size - 1).bit_length()
            self._host = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            self._on_device = torch.empty(size, dtype=torch.uint8, device=self.device)


def make_inputs(device: torch.device) -> StepInputs:
    """What brings inputs to `device`."""
    return DirectInputs() if device.type == "cpu" else PackedInputs(device)


def _starts(arrays: Sequence[np.ndarray]) -> list[int]:
    """Where each array begins in the buffer, and at the end its size."""
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-array.nbytes // ALIGNMENT) * ALIGNMENT)
    return starts


def _field(buffer: torch.Tensor, start: int, array: np.ndarray) -> torch.Tensor:
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    return buffer[start : start + array.nbytes].view(dtype).view(array.shape)


class DeviceToHostCopy:
    """Numbers on their way from the device to the host, which will wait for these and for nothing asked of the device
    later."""

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
        """The numbers, nested as the tensor is."""
        if self._event is None:
            return self._numbers
        self._event.synchronize()
        return self._host.tolist()
