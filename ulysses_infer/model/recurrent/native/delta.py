"""The inner part of layers with a delta rule on a CPU, in one call (`native/recurrent/delta_net.c`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ulysses_infer.cache.states import CONVOLUTION, RECURRENT, StateCache
from ulysses_infer.model.recurrent.native.form import (
    MOST_TAPS,
    Convolution,
    Fed,
    FedPart,
    StructFunction,
    can_run,
)
from ulysses_infer.model.recurrent.runs import Run

LIBRARY = "delta_net"


class DeltaParts(NamedTuple):
    """The parts of a layer's inputs; groups are key heads."""

    q: FedPart
    k: FedPart
    v: FedPart
    z: FedPart
    b: FedPart
    a: FedPart


class DeltaLayer(NamedTuple):
    """A layer with this rank's heads, as the kernel sees it."""

    parts: DeltaParts
    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    convolution: Any
    decay: torch.Tensor
    """[value heads], log."""
    decay_bias: torch.Tensor
    """[value heads], or [key heads * key width]."""
    norm: torch.Tensor
    """[value width]"""
    epsilon: float
    is_per_channel: bool = False
    """Whether each channel of the keys has its own decay (Kimi delta attention)."""
    rounds_decays: bool = False
    """Whether the logarithms of the decays have the dtype of the inputs."""
    lower_bound: float = 0.0
    """Of these logarithms; 0 for none."""
    strength: float = 1.0
    """Of a write whose gate is open."""


class _DeltaNet(ctypes.Structure):
    """`struct delta_net` of delta_net.h."""

    _fields_ = (
        *((name, Fed) for name in DeltaParts._fields),
        ("conv", Convolution),
        *((name, ctypes.c_int64) for name in ("sequences", "length")),
        *((name, ctypes.c_int64) for name in ("key_heads", "value_heads", "key_width", "value_width")),
        *((name, ctypes.c_void_p) for name in ("decay", "decay_bias", "norm", "states")),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "scratch", "out")),
        *(
            (name, ctypes.c_int64)
            for name in ("is_per_channel", "rounds_decays", "has_float32_decay", "has_float32_bias")
        ),
        *((name, ctypes.c_float) for name in ("epsilon", "lower_bound", "strength")),
    )


class NativeDeltaNet:
    """Runs what lies between the projections of a layer: convolution, delta rule and gated norm."""

    def __init__(self, module: Any, describe: Callable[[Any], DeltaLayer], dtype: torch.dtype) -> None:
        """module: with this rank's heads. describe: called in each step, because weights may be replaced."""
        self._module, self._describe = module, describe
        self._run = StructFunction(LIBRARY, dtype)

    @classmethod
    def of(cls, module: Any, describe: Callable[[Any], DeltaLayer], dtype: torch.dtype) -> NativeDeltaNet | None:
        """The native form of `module`; None if it has other types or sizes than the kernel, or cannot be built."""
        layer = describe(module)
        weights = (layer.convolution.weight, layer.convolution.bias, layer.decay, layer.decay_bias)
        fits = layer.norm.dtype == dtype and layer.convolution.weight.shape[-1] <= MOST_TAPS
        widths = layer.key_width, layer.value_width
        return cls(module, describe, dtype) if fits and can_run(LIBRARY, dtype, weights, widths) else None

    def __call__(self, states: StateCache, layer: int, run: Run, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """inputs: each [T, own features]; returns [n * length, own values] of the run, and updates its states."""
        own, described = [run.pick(each) for each in inputs], self._describe(self._module)
        out = own[0].new_empty(own[0].shape[0], described.value_heads * described.value_width)
        arguments = _arguments(described, states, layer, run, own)
        arguments.out = out.data_ptr()
        self._run(arguments)
        return out


def _arguments(given: DeltaLayer, states: StateCache, layer: int, run: Run, own: Sequence[torch.Tensor]) -> _DeltaNet:
    recurrent = states.state(layer, RECURRENT)
    return _DeltaNet(
        *(Fed.of(own, part) for part in given.parts),
        Convolution.of(given.convolution, states.state(layer, CONVOLUTION)),
        len(run.slots),
        run.length,
        given.key_heads,
        given.value_heads,
        given.key_width,
        given.value_width,
        given.decay.data_ptr(),
        given.decay_bias.data_ptr(),
        given.norm.data_ptr(),
        recurrent.data_ptr(),
        recurrent.stride(0),
        run.slots.data_ptr(),
        is_per_channel=given.is_per_channel,
        rounds_decays=given.rounds_decays,
        has_float32_decay=given.decay.dtype == torch.float32,
        has_float32_bias=given.decay_bias.dtype == torch.float32,
        epsilon=given.epsilon,
        lower_bound=given.lower_bound,
        strength=given.strength,
    )
