"""Products of tokens with the dense matrices of their experts, by `native/products/experts.c`."""

from __future__ import annotations

import numpy as np
import torch

from ulysses_infer.native.choice import TORCH, Choice
from ulysses_infer.native.function import MATMUL, NativeFunction
from ulysses_infer.native.library import open_library

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
KERNELS = {"few": 0, "panels": 1, "pairs": 2}  # `enum kernel`
MOST_ROWS = 256  # of an expert: the kernel of more is the same
TRANSPOSED = Choice({1: "few", 17: "panels"})
"""For matrices that are stored by input: read as they are for few rows, expanded for more."""


class NativeExperts:
    """One call per matrix of all experts of a layer. The kernel reads from memory how many rows each expert has.

    Raises `NativeUnavailableError` if the library cannot be built.
    """

    def __init__(self) -> None:
        library = open_library("experts")
        self._functions = {
            (dtype, is_transposed): NativeFunction(
                library, f"{'transposed_' * is_transposed}experts_{name}", "pppppiiiiiiipi", MATMUL, _raise_memory_error
            )
            for dtype, name in NAMES.items()
            for is_transposed in (False, True)
        }
        self._tables: dict[tuple[tuple[int, str], ...], np.ndarray] = {}  # kept: recorded steps have their addresses

    def serves(self, tokens: torch.Tensor, matrices: torch.Tensor) -> bool:
        """Whether `multiply` takes tokens [S, K] and matrices [E, N, K]."""
        if tokens.dtype != matrices.dtype or tokens.dtype not in NAMES or tokens.stride(-1) != 1:
            return False
        return 1 in matrices.stride()[1:]

    def multiply(
        self,
        tokens: torch.Tensor,
        matrices: torch.Tensor,
        bias: torch.Tensor | None,
        ends: torch.Tensor,
        choice: Choice,
    ) -> torch.Tensor:
        """tokens: [S, K], those of expert e before row `ends[e]`; matrices: [E, N, K], views with one dense dimension.

        bias: [E, N] with dense rows; ends: [E] int32; choice: the kernel for a number of rows. Returns [S, N]; rows
        after the last expert's are not written. Raises `MemoryError`.
        """
        count, outputs, width = matrices.shape
        is_transposed = matrices.stride(2) != 1
        result = tokens.new_empty(len(tokens), outputs)
        table = self._table(TRANSPOSED if is_transposed else choice)
        self._functions[tokens.dtype, is_transposed](
            tokens.data_ptr(),
            matrices.data_ptr(),
            None if bias is None else bias.data_ptr(),
            result.data_ptr(),
            ends.data_ptr(),
            count,
            outputs,
            width,
            tokens.stride(0),
            matrices.stride(2 if is_transposed else 1),
            matrices.stride(0),
            0 if bias is None else bias.stride(0),
            table.ctypes.data,
            len(table) - 1,
        )
        return result

    def _table(self, choice: Choice) -> np.ndarray:
        """The number of the kernel for each number of rows."""
        key = tuple(choice.kernels.items())
        if key not in self._tables:
            names = [choice(max(rows, 1)) for rows in range(MOST_ROWS + 1)]
            # Panels where torch would be faster, which would have to know the number of rows.
            self._tables[key] = np.array([KERNELS["panels" if n == TORCH else n] for n in names], dtype=np.uint8)
        return self._tables[key]


def _raise_memory_error(_: int) -> None:
    raise MemoryError("out of memory for the inputs of the products of experts")
