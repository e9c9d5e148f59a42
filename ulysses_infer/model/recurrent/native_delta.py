"""The inner part of a gated delta net on a CPU, in one call (`native/delta_net.c`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ulysses_infer.cache.states import CONVOLUTION, RECURRENT, StateCache
from ulysses_infer.model.recurrent.runs import Run
from ulysses_infer.native.function import ELEMENTWISE, NativeFunction
from ulysses_infer.native.library import is_available, open_library

SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
LANES = 16  # of the widest vectors; widths must be multiples of it


class FedPart(NamedTuple):
    """Where a part of the projections' outputs lies: heads in groups, one per key head."""

    number: int
    """Of the projection."""
    start: int
    group: int
    head: int = 0
    """Distances, in elements, between groups and between the value heads of one."""


class DeltaParts(NamedTuple):
    """The parts of a gated delta net's inputs."""

    q: FedPart
    k: FedPart
    v: FedPart
    z: FedPart
    b: FedPart
    a: FedPart


class _Fed(ctypes.Structure):
    """`struct fed` of delta_net.h."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "group", "head")))


class _DeltaNet(ctypes.Structure):
    """`struct delta_net` of delta_net.h."""

    _fields_ = (
        *((name, _Fed) for name in DeltaParts._fields),
        *((name, ctypes.c_int64) for name in ("sequences", "length", "key_heads", "value_heads")),
        *((name, ctypes.c_int64) for name in ("key_width", "value_width", "kernel")),
        *((name, ctypes.c_void_p) for name in ("conv_weight", "conv_bias", "decay", "decay_bias", "norm")),
        *((name, ctypes.c_void_p) for name in ("conv_states", "states")),
        *((name, ctypes.c_int64) for name in ("conv_stride", "stride")),
        *((name, ctypes.c_void_p) for name in ("slots", "scratch", "out")),
        ("epsilon", ctypes.c_float),
    )


class NativeDeltaNet:
    """Runs what lies between the projections of a gated delta net: convolution, delta rule and gated norm."""

    def __init__(self, module: Any, parts: DeltaParts) -> None:
        """module: with this rank's heads."""
        self._module, self._parts = module, parts
        library = open_library("delta_net")
        self._run = NativeFunction(library, f"delta_net_{SUFFIXES[module.norm.weight.dtype]}", "p", ELEMENTWISE)
        self._floats = library.floats_of_delta_net
        self._floats.argtypes, self._floats.restype = [ctypes.c_void_p], ctypes.c_int64

    @classmethod
    def of(cls, module: Any, parts: DeltaParts) -> NativeDeltaNet | None:
        """The native form of `module`; None if it has other types or sizes than the kernel, or cannot be built."""
        weights = (module.conv1d.weight, module.conv1d.bias, module.A_log, module.dt_bias, module.norm.weight)
        dtypes = {weight.dtype for weight in weights if weight is not None}
        fits = dtypes <= SUFFIXES.keys() and len(dtypes) == 1 and all(w.is_cpu for w in weights if w is not None)
        fits = fits and module.head_k_dim % LANES == module.head_v_dim % LANES == 0
        return cls(module, parts) if fits and is_available("delta_net") else None

    def __call__(self, states: StateCache, layer: int, run: Run, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """inputs: each [T, own features]; returns [n * length, own values] of the run, and updates its states."""
        module = self._module
        own = [run.pick(each) for each in inputs]
        conv, recurrent = states.state(layer, CONVOLUTION), states.state(layer, RECURRENT)
        rows, width = len(run.slots) * run.length, module.num_v_heads * module.head_v_dim
        out = own[0].new_empty(rows, width)
        bias = module.conv1d.bias
        arguments = _DeltaNet(
            *(_fed(own[part.number], part) for part in self._parts),
            len(run.slots),
            run.length,
            module.num_k_heads,
            module.num_v_heads,
            module.head_k_dim,
            module.head_v_dim,
            conv.shape[-1],
            module.conv1d.weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            module.A_log.data_ptr(),
            module.dt_bias.data_ptr(),
            module.norm.weight.data_ptr(),
            conv.data_ptr(),
            recurrent.data_ptr(),
            conv.stride(0),
            recurrent.stride(0),
            run.slots.data_ptr(),
        )
        arguments.epsilon = module.layer_norm_epsilon
        scratch = torch.empty(self._floats(ctypes.byref(arguments)), dtype=torch.float32)
        arguments.scratch, arguments.out = scratch.data_ptr(), out.data_ptr()
        self._run(ctypes.byref(arguments))
        return out


def _fed(tensor: torch.Tensor, part: FedPart) -> _Fed:
    assert tensor.stride(1) == 1
    return _Fed(tensor.data_ptr() + part.start * tensor.element_size(), tensor.stride(0), part.group, part.head)
