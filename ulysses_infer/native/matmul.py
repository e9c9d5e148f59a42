"""Matrix products of linear layers by `native/matmul.c`."""

from __future__ import annotations

import ctypes

import torch
from torch.nn import functional as F

from ulysses_infer.errors import ConfigError
from ulysses_infer.native.function import MATMUL, NativeFunction
from ulysses_infer.native.library import NativeUnavailableError, is_available, open_library


class NativeMatmul:
    """Products of up to `most_rows` rows by `native/matmul.c`; torch computes larger ones.

    Few rows are multiplied at memory bandwidth. On CPUs with bfloat16 dot products and without matrix units this is
    faster than torch for any number of rows. Up to `most_rows`, a row's result does not depend on the other rows; but
    with bfloat16 dot products, 13 to 16 rows and 28 or more are summed in another order than other numbers of rows.
    Raises `NativeUnavailableError` if the library cannot be built.
    """

    name = "native"

    def __init__(self) -> None:
        library = open_library("matmul")
        self._functions = {
            torch.bfloat16: NativeFunction(library, "matmul_bfloat16", "ppppiiiii", MATMUL),
            torch.float32: NativeFunction(library, "matmul_float32", "ppppiiiii", MATMUL),
        }
        self.most_rows = {
            dtype: ctypes.c_int64.in_dll(library, name).value
            for dtype, name in ((torch.bfloat16, "most_rows_bfloat16"), (torch.float32, "most_rows_float32"))
        }

    def __call__(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See `linear`."""
        (outputs, width), (row_stride, element_stride) = weight.shape, weight.stride()
        rows, dtype = inputs.numel() // width, weight.dtype
        if rows > self.most_rows.get(dtype, 0) or element_stride != 1 or inputs.dtype != dtype:
            return F.linear(inputs, weight, bias)
        inputs = inputs.contiguous()
        result = inputs.new_empty(*inputs.shape[:-1], outputs)
        self._functions[dtype](
            inputs.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            result.data_ptr(),
            rows,
            outputs,
            width,
            width,
            row_stride,
        )
        return result


def make_matmul(name: str, device: torch.device) -> NativeMatmul | None:
    """The backend of `runtime.matmul_backend`; None means torch. Raises `ConfigError` if it is not available here."""
    if name == "torch" or (name == "auto" and (device.type != "cpu" or not is_available("matmul"))):
        return None
    if device.type != "cpu":
        raise ConfigError(f"runtime.matmul_backend is native, which runs on a CPU, not on {device.type}; use auto")
    try:
        return NativeMatmul()
    except NativeUnavailableError as error:
        raise ConfigError(f"runtime.matmul_backend is native, but {error}; use auto or torch") from error
