"""What the native forms of recurrent layers share: calls with one struct, and their short convolutions."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ulysses_infer.native.function import ELEMENTWISE, NativeFunction
from ulysses_infer.native.library import is_available, open_library

SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
LANES = 16  # of the widest vectors; widths must be multiples of it
MOST_TAPS = 8  # of short_convolution.h


class FedPart(NamedTuple):
    """Where a part of the projections' outputs lies: heads in groups."""

    number: int
    """Of the projection."""
    start: int
    group: int
    head: int = 0
    """Distances, in elements, between groups and between the heads of one."""


class Fed(ctypes.Structure):
    """`struct fed` of short_convolution.h."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "group", "head")))

    @classmethod
    def of(cls, inputs: Sequence[torch.Tensor], part: FedPart) -> Fed:
        """inputs: the projections' outputs, each [T, features]."""
        tensor = inputs[part.number]
        return cls(address(tensor, part.start), tensor.stride(0), part.group, part.head)


class Convolution(ctypes.Structure):
    """`struct convolution` of short_convolution.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "states")),
        *((name, ctypes.c_int64) for name in ("stride", "channels", "taps", "is_float32")),
    )

    @classmethod
    def of(cls, module: Any, states: torch.Tensor) -> Convolution:
        """module: a convolution with one filter per channel; states: [slots, channels, taps]."""
        weight, bias = module.weight, module.bias
        return cls(
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            states.data_ptr(),
            states.stride(0),
            weight.shape[0],
            weight.shape[-1],
            weight.dtype == torch.float32,
        )


class StructFunction:
    """A C function of one struct, which has the members `scratch`."""

    def __init__(self, library: str, dtype: torch.dtype, name: str | None = None) -> None:
        """name: without the type; by default that of the library, as is its function for the size of the scratch."""
        opened = open_library(library)
        self._run = NativeFunction(opened, f"{name or library}_{SUFFIXES[dtype]}", "p", ELEMENTWISE)
        self._floats = opened[f"floats_of_{name or library}"]
        self._floats.argtypes, self._floats.restype = [ctypes.c_void_p], ctypes.c_int64

    def __call__(self, arguments: Any) -> None:
        """Call it with `arguments`, and with the scratch memory that it needs."""
        scratch = torch.empty(self._floats(ctypes.byref(arguments)), dtype=torch.float32)
        arguments.scratch = scratch.data_ptr()
        self._run(ctypes.byref(arguments))


def address(tensor: torch.Tensor, index: int = 0) -> int:
    """Of the element `index` of each row; the elements of a row must be neighbours."""
    assert tensor.stride(-1) == 1
    return tensor.data_ptr() + index * tensor.element_size()


def can_run(library: str, dtype: torch.dtype, weights: Iterable[torch.Tensor | None], widths: Iterable[int]) -> bool:
    """Whether `library` takes inputs of `dtype`, `weights` of that dtype or float32, and `widths`, and can be built."""
    given = [weight for weight in weights if weight is not None]
    fits = dtype in SUFFIXES and all(weight.dtype in (dtype, torch.float32) and weight.is_cpu for weight in given)
    return fits and all(width > 0 and width % LANES == 0 for width in widths) and is_available(library)
