"""Short convolutions on a CPU (`native/recurrent/short_convolution.c`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from ulysses_infer.cache.states import CONVOLUTION, StateCache
from ulysses_infer.model.recurrent.native.form import MOST_TAPS, Convolution, StructFunction, address, can_run
from ulysses_infer.model.recurrent.runs import Run

LIBRARY = "short_convolution"


class _ShortConvolution(ctypes.Structure):
    """`struct short_convolution` of short_convolution.c."""

    _fields_ = (
        ("conv", Convolution),
        *((name, ctypes.c_void_p) for name in ("input", "before", "after")),
        *((name, ctypes.c_int64) for name in ("row", "sequences", "length")),
        *((name, ctypes.c_void_p) for name in ("slots", "scratch", "out")),
    )


class NativeConvolution:
    """A convolution with one filter per channel and its state, with SiLU or between two factors."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._run = StructFunction(LIBRARY, dtype)

    @staticmethod
    def can_run(module: Any, dtype: torch.dtype) -> bool:
        """Whether the kernel takes the convolution `module` and inputs of `dtype`."""
        fits = module.weight.shape[-1] <= MOST_TAPS
        return fits and can_run(LIBRARY, dtype, (module.weight, module.bias), (module.weight.shape[0],))

    def __call__(self, module: Any, state: torch.Tensor, run: Run, own: torch.Tensor, *, between: bool) -> torch.Tensor:
        """own: [n * length, features] of the run. The first are the inputs [C] of the convolution `module`; or, with
        `between`, a factor of the inputs, one of the result, and the inputs, [C] each. state: [slots, C, taps].

        Returns [n * length, C], with SiLU unless `between`; updates the state.
        """
        channels = module.weight.shape[0]
        out = own.new_empty(own.shape[0], channels)
        before, after, first = (address(own), address(own, channels), 2 * channels) if between else (None, None, 0)
        arguments = _ShortConvolution(
            Convolution.of(module, state),
            address(own, first),
            before,
            after,
            own.stride(0),
            len(run.slots),
            run.length,
            run.slots.data_ptr(),
        )
        arguments.out = out.data_ptr()
        self._run(arguments)
        return out


class NativeShortConvolution:
    """The inner part of a layer that is a convolution between two factors (LFM)."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self._module, self._convolve = module, NativeConvolution(dtype)

    @classmethod
    def of(cls, module: Any, dtype: torch.dtype) -> NativeShortConvolution | None:
        """The native form of `module`; None if the kernel does not take it or cannot be built."""
        return cls(module, dtype) if NativeConvolution.can_run(module.conv, dtype) else None

    def __call__(self, states: StateCache, layer: int, run: Run, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `InnerForm`."""
        state = states.state(layer, CONVOLUTION)
        return self._convolve(self._module.conv, state, run, run.pick(inputs[0]), between=True)
