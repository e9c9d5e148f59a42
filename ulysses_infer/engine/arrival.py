"""What comes back from the device without anybody waiting for it before it is needed."""

from __future__ import annotations

import torch


class Arrival:
    """Numbers on their way from the device to the host, which will wait for these and for nothing asked of the device
    later."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = numbers
        self._event: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> torch.Tensor:
        """The numbers, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers
