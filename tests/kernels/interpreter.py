"""Triton's interpreter with the roundings of a GPU."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

NARROW = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


@functools.cache
def use_exact_rounding() -> None:
    """Let the interpreter round float32 to bfloat16 and FP8 to the nearest value.

    It cuts bfloat16 off, loses the carry into the exponent of FP8, and multiplies matrices of bfloat16 by their bits.
    """
    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target not in NARROW:
            return convert(data, source, target, mode)
        wide = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float32)
        narrow = wide.to(NARROW[target])
        bits = narrow.view(torch.uint8 if narrow.itemsize == 1 else torch.int16).numpy()
        return bits.view(np.uint8 if narrow.itemsize == 1 else np.uint16).reshape(data.shape)

    interpreter._convert_float = rounded
    dot = interpreter.InterpreterBuilder.create_dot

    def exact_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, *(wide(x) for x in (a, b)), *rest)

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = exact_dot
