"""The inner part of lightning attention on a CPU (`native/recurrent/lightning.c`), with its norm."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from ulysses_infer.cache.states import RECURRENT, StateCache
from ulysses_infer.model.recurrent.native.form import StructFunction, address, can_run
from ulysses_infer.model.recurrent.native.norm import GatedNorm, NativeGatedNorm, NormGroups
from ulysses_infer.model.recurrent.rules import Owner
from ulysses_infer.model.recurrent.runs import Run
from ulysses_infer.native.library import is_available

LIBRARY = "lightning"


class _Lightning(ctypes.Structure):
    """`struct lightning` of lightning.c."""

    _fields_ = (
        ("inputs", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row", "sequences", "length", "heads", "width")),
        ("slopes", ctypes.c_void_p),
        ("has_float32_slopes", ctypes.c_int64),
        ("states", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "scratch", "output", "squares")),
    )


class NativeLightning:
    """Runs what lies between the projections of lightning attention."""

    def __init__(self, module: Any, dtype: torch.dtype, ranks: int, epsilon: float) -> None:
        """module: with this rank's heads; all `ranks` share its norm, which has `epsilon`."""
        self._module, self._groups = module, NormGroups(1, 0, 1, ranks)
        self._epsilon = epsilon
        self._run, self._normalise = StructFunction(LIBRARY, dtype), NativeGatedNorm(dtype)

    @classmethod
    def of(cls, module: Any, dtype: torch.dtype, owner: Owner, epsilon: float) -> NativeLightning | None:
        """The native form of `module`; None if the kernel does not take it or cannot be built."""
        fits = module.norm.weight.dtype == dtype and is_available("state_space")
        fits = fits and can_run(LIBRARY, dtype, (module.slope_rate,), (module.head_dim,))
        return cls(module, dtype, owner.world_size, epsilon) if fits else None

    def __call__(self, states: StateCache, layer: int, run: Run, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `InnerForm`."""
        module, recurrent = self._module, states.state(layer, RECURRENT)
        own, gate = (run.pick(each) for each in inputs)
        inner = module.num_attention_heads * module.head_dim
        output = own.new_empty(own.shape[0], inner, dtype=torch.float32)
        squares = own.new_empty(own.shape[0], 1, dtype=torch.float32)
        arguments = _Lightning(
            address(own),
            own.stride(0),
            len(run.slots),
            run.length,
            module.num_attention_heads,
            module.head_dim,
            module.slope_rate.data_ptr(),
            module.slope_rate.dtype == torch.float32,
            recurrent.data_ptr(),
            recurrent.stride(0),
            run.slots.data_ptr(),
            output=output.data_ptr(),
            squares=squares.data_ptr(),
        )
        self._run(arguments)
        norm = GatedNorm(module.norm.weight, self._epsilon, self._groups, gates_last=True, is_sigmoid=True)
        return self._normalise(norm, output, squares, gate, is_single=True)
