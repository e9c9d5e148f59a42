"""Copies from the host that do not wait for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch


def to_device_async(
    values: Sequence[Any] | npt.NDArray[Any], like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Copy `values` to the device of `like` without waiting for it."""
    return _start_copy(torch.tensor(values, dtype=dtype, pin_memory=like.is_cuda), like.device)


def _start_copy(on_host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return on_host.to(device, non_blocking=True)


def column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """`values` as a [m, 1] column of `like`'s type and device."""
    return to_device_async(values, like, like.dtype)[:, None]
