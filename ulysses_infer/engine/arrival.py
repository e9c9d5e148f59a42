"""What comes back from the device without anybody waiting for it before it is needed."""

from __future__ import annotations

from typing import Any

import torch


class Arrival:
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
