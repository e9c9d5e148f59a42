"""The inner part of Mamba 2 on a CPU (`native/state_space.c`): two calls, with a spread norm's sum in between."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ulysses_infer.cache.states import CONVOLUTION, RECURRENT, StateCache
from ulysses_infer.model.recurrent.native_form import MOST_TAPS, SUFFIXES, Convolution, StructFunction, can_run
from ulysses_infer.model.recurrent.rules import Owner
from ulysses_infer.model.recurrent.runs import Run
from ulysses_infer.model.recurrent.spread import sum_over_ranks
from ulysses_infer.native.function import ELEMENTWISE, NativeFunction
from ulysses_infer.native.library import open_library

LIBRARY = "state_space"
MOST_WIDTH = 256  # of a head, in state_space.c


class _StateSpace(ctypes.Structure):
    """`struct state_space` of state_space.c."""

    _fields_ = (
        ("conv", Convolution),
        ("inputs", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row", "sequences", "length")),
        *((name, ctypes.c_int64) for name in ("heads", "groups", "width", "num_states")),
        *((name, ctypes.c_void_p) for name in ("rates", "step_bias", "skip", "states")),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "scratch", "output", "squares")),
        *((name, ctypes.c_int64) for name in ("sums", "first_sum", "own_sums", "gates_output")),
        *((name, ctypes.c_float) for name in ("shortest", "longest")),
    )


class _Norm(ctypes.Structure):
    """`struct state_space_norm` of state_space.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("output", "squares", "inputs", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("row", "tokens", "inner", "sums", "first_sum", "own_sums")),
        *((name, ctypes.c_int64) for name in ("group", "is_single", "gates_last", "rounds_unit")),
        ("epsilon", ctypes.c_float),
    )


class NormGroups(NamedTuple):
    """The groups of features that the norm of a layer normalises together, over all ranks."""

    sums: int
    """How many sums of squares there are."""
    first: int
    """The first that this rank's features belong to."""
    own: int
    """How many it takes part in."""
    sharers: int
    """Ranks that share a group."""


def norm_groups(module: Any, groups: int, owner: Owner) -> NormGroups:
    """groups: of the whole layer. No sums if the layer has no norm."""
    if not has_norm(module):
        return NormGroups(0, 0, 0, 1)
    if groups < owner.world_size:
        sharers = owner.world_size // groups
        return NormGroups(groups, owner.shard // sharers, 1, sharers)
    return NormGroups(groups // owner.world_size, 0, groups // owner.world_size, 1)


def has_norm(module: Any) -> bool:
    """Whether the layer's output is normalised."""
    return any(True for _ in module.norm.parameters())


class NativeMamba2:
    """Runs what lies between the projections of Mamba 2."""

    def __init__(self, module: Any, dtype: torch.dtype, groups: NormGroups) -> None:
        """module: with this rank's heads."""
        self._module, self._groups = module, groups
        self._scan = StructFunction(LIBRARY, dtype)
        self._normalise = NativeFunction(open_library(LIBRARY), f"state_space_norm_{SUFFIXES[dtype]}", "p", ELEMENTWISE)
        norm = getattr(module, "norm", None)
        self._gates_last = bool(getattr(norm, "norm_before_gate", not has_norm(module)))
        self._rounds_unit = groups.sharers > 1 or not hasattr(norm, "norm_before_gate")

    @classmethod
    def of(cls, module: Any, dtype: torch.dtype, owner: Owner, groups: int) -> NativeMamba2 | None:
        """The native form of `module`, which has `groups` on all ranks; None if the kernel does not take it."""
        conv, norm = module.conv1d, norm_groups(module, groups, owner)
        weights = (conv.weight, conv.bias)
        widths = [module.head_dim, module.ssm_state_size, module.intermediate_size // max(1, norm.own)]
        fits = all(w.dtype == dtype for w in (module.A_log, module.D, module.dt_bias, *module.norm.parameters()))
        fits = fits and module.head_dim <= MOST_WIDTH and conv.weight.shape[-1] <= MOST_TAPS
        return cls(module, dtype, norm) if fits and can_run(LIBRARY, dtype, weights, widths) else None

    def __call__(self, states: StateCache, layer: int, run: Run, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `InnerForm`."""
        module, own = self._module, run.pick(inputs[0])
        scale = getattr(module, "mup_vector", None)
        if scale is not None:
            own = own * scale[0]
        tokens, inner = own.shape[0], module.intermediate_size
        output = own.new_empty(tokens, inner, dtype=torch.float32)
        squares = own.new_empty(tokens, max(1, self._groups.sums), dtype=torch.float32)
        self._scan(self._scan_arguments(states, layer, run, own, output, squares))
        if self._groups.sharers > 1:
            squares = sum_over_ranks(squares)
        out = own.new_empty(tokens, inner)
        arguments = self._norm_arguments(run, own, output, squares, out)
        self._normalise(ctypes.byref(arguments))
        return out

    def _scan_arguments(
        self, states: StateCache, layer: int, run: Run, own: torch.Tensor, output: torch.Tensor, squares: torch.Tensor
    ) -> _StateSpace:
        module, groups, recurrent = self._module, self._groups, states.state(layer, RECURRENT)
        shortest, longest = module.time_step_limit
        return _StateSpace(
            Convolution.of(module.conv1d, states.state(layer, CONVOLUTION)),
            own.data_ptr(),
            own.stride(0),
            len(run.slots),
            run.length,
            module.num_heads,
            module.n_groups,
            module.head_dim,
            module.ssm_state_size,
            module.A_log.data_ptr(),
            module.dt_bias.data_ptr(),
            module.D.data_ptr(),
            recurrent.data_ptr(),
            recurrent.stride(0),
            run.slots.data_ptr(),
            output=output.data_ptr(),
            squares=squares.data_ptr(),
            sums=groups.sums,
            first_sum=groups.first,
            own_sums=groups.own,
            gates_output=not self._gates_last,
            shortest=shortest,
            longest=longest,
        )

    def _norm_arguments(
        self, run: Run, own: torch.Tensor, output: torch.Tensor, squares: torch.Tensor, out: torch.Tensor
    ) -> _Norm:
        module, groups = self._module, self._groups
        weighted = groups.sums > 0
        return _Norm(
            output.data_ptr(),
            squares.data_ptr(),
            own.data_ptr(),
            module.norm.weight.data_ptr() if weighted else None,
            out.data_ptr(),
            own.stride(0),
            own.shape[0],
            module.intermediate_size,
            groups.sums,
            groups.first,
            groups.own,
            module.intermediate_size * groups.sharers // max(1, groups.own),
            run.length == 1,
            self._gates_last,
            self._rounds_unit,
            module.norm.variance_epsilon if weighted else 0.0,
        )
