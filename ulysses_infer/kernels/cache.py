"""Writes a step's keys and values into the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.heads import stored
from ulysses_infer.kernels.launch import launch

TILE = 1024
"""Values per program."""


@triton.jit
def store_kernel(
    key,
    value,
    slots,
    keys,
    values,
    key_row,
    key_head,
    value_row,
    value_head,
    key_size,
    value_size,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per token, tile of its values, and key or value. The cache's rows are dense."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    number = tl.program_id(1) * TILE + tl.arange(0, TILE)
    dtype: tl.constexpr = key.dtype.element_ty
    to: tl.constexpr = keys.dtype.element_ty
    if tl.program_id(2) == 0:
        place = key + token * key_row + (number // KEY_WIDTH) * key_head + number % KEY_WIDTH
        new = tl.load(place, mask=number < key_size, other=0.0).to(tl.float32)
        tl.store(keys + slot * key_size + number, stored(new, 1.0, dtype, to), mask=number < key_size)
    else:
        place = value + token * value_row + (number // VALUE_WIDTH) * value_head + number % VALUE_WIDTH
        new = tl.load(place, mask=number < value_size, other=0.0).to(tl.float32)
        tl.store(values + slot * value_size + number, stored(new, 1.0, dtype, to), mask=number < value_size)


def store(
    keys: torch.Tensor, values: torch.Tensor | None, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Write key [T, H, d] and value [T, H, dv] to rows `slots` [T] of the dense caches [rows, H, d | dv].

    values: None if they are part of the keys. The last dimensions of key and value are dense.
    """
    sizes = (key.shape[1] * key.shape[2], value.shape[1] * value.shape[2])
    launch(
        store_kernel,
        (len(slots), triton.cdiv(max(sizes), TILE), 1 if values is None else 2),
        key,
        value,
        slots,
        keys,
        keys if values is None else values,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        *sizes,
        KEY_WIDTH=key.shape[2],
        VALUE_WIDTH=value.shape[2],
        TILE=TILE,
    )
