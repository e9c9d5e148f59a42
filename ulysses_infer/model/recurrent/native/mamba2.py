"""Mamba 2's inner part on a CPU (`native/recurrent/state_space.c`): two calls, with a norm's sum over ranks between."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from ulysses_infer.cache.states import CONVOLUTION, RECURRENT, StateCache
from ulysses_infer.model.recurrent.native.form import MOST_TAPS, Convolution, StructFunction, can_run
from ulysses_infer.model.recurrent.native.norm import GatedNorm, NativeGatedNorm, NormGroups
from ulysses_infer.model.recurrent.rules import Owner
from ulysses_infer.model.recurrent.runs import Run

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
        self._normalise = NativeGatedNorm(dtype)
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
        tokens = own.shape[0]
        output = own.new_empty(tokens, module.intermediate_size, dtype=torch.float32)
        squares = own.new_empty(tokens, max(1, self._groups.sums), dtype=torch.float32)
        self._scan(self._scan_arguments(states, layer, run, own, output, squares))
        return self._normalise(self._output_norm(), output, squares, own, is_single=run.length == 1)

    def _output_norm(self) -> GatedNorm:
        norm = self._module.norm
        weighted = self._groups.sums > 0
        return GatedNorm(
            norm.weight if weighted else None,
            norm.variance_epsilon if weighted else 0.0,
            self._groups,
            gates_last=self._gates_last,
            rounds_unit=self._rounds_unit,
        )

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
