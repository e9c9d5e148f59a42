"""Launches Triton kernels, counts the launches, and says which devices run them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PRODUCT_CAPABILITY = (8, 0)
"""The first compute capability with bfloat16 tensor cores."""
FP8_CAPABILITY = (8, 9)
"""The first compute capability with FP8 (e4m3) conversions."""

_assumed: dict[str, tuple[int, int]] = {}
_counters: list[Counter[str]] = []


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU; None for other devices."""
    if device.type in _assumed:
        return _assumed[device.type]
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton kernels run on `device`."""
    return capability(device) is not None and has_triton()


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported; torch's GPU builds bring it."""
    try:
        from triton import jit
    except ImportError:
        return False
    return callable(jit)


def runs_products(device: torch.device) -> bool:
    """Whether the Triton kernel that multiplies stored weights runs on `device`."""
    found = capability(device)
    return found is not None and found >= PRODUCT_CAPABILITY and has_triton()


def has_fp8(device: torch.device) -> bool:
    """Whether Triton kernels on `device` can write FP8."""
    found = capability(device)
    return found is not None and found >= FP8_CAPABILITY and has_triton()


@contextmanager
def assume(device_type: str, compute_capability: tuple[int, int]) -> Iterator[None]:
    """Within the `with` block, treat `device_type` as a GPU: `cpu` for Triton's interpreter, `meta` to count."""
    before = dict(_assumed)
    _assumed[device_type] = compute_capability
    try:
        yield
    finally:
        _assumed.clear()
        _assumed.update(before)


@contextmanager
def counted(counter: Counter[str]) -> Iterator[None]:
    """Add the launches within the `with` block to `counter`, by kernel name."""
    _counters.append(counter)
    try:
        yield
    finally:
        _counters.remove(counter)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
    """Launch `kernel` on `grid`. An empty grid launches nothing. On device `meta` launches are only counted."""
    if 0 in grid:
        return
    for counter in _counters:
        counter[kernel.__name__] += 1
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    if any(tensor.is_meta for tensor in tensors):
        if elsewhere := [tensor.device for tensor in tensors if not tensor.is_meta]:
            raise RuntimeError(f"{kernel.__name__} of device meta is given a tensor of {elsewhere[0]}")
        return
    kernel[grid](*arguments, num_warps=num_warps, **constants)
