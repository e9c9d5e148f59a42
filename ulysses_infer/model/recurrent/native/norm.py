"""Gated norms over groups of features on a CPU (`native/recurrent/state_space.c`), also of groups that ranks share."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from ulysses_infer.model.recurrent.native.form import SUFFIXES, address
from ulysses_infer.model.recurrent.spread import sum_over_ranks
from ulysses_infer.native.function import ELEMENTWISE, NativeFunction
from ulysses_infer.native.library import open_library

LIBRARY = "state_space"


class _Norm(ctypes.Structure):
    """`struct state_space_norm` of state_space.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("output", "squares", "inputs", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("row", "tokens", "inner", "sums", "first_sum", "own_sums")),
        *((name, ctypes.c_int64) for name in ("group", "is_single", "gates_last", "is_sigmoid", "rounds_unit")),
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


class GatedNorm(NamedTuple):
    """A norm and its gate, which are applied to what a recurrence gives."""

    weight: torch.Tensor | None
    """[own features]; None for no norm."""
    epsilon: float
    groups: NormGroups
    gates_last: bool
    """Whether the gate follows the norm; otherwise it was applied before."""
    is_sigmoid: bool = False
    """Whether the gate is the sigmoid; otherwise it is SiLU."""
    rounds_unit: bool = True
    """Whether the features of single tokens are rounded before they are multiplied by the weight."""


class NativeGatedNorm:
    """Normalises, once the sums of squares have been summed over the ranks that share a group."""

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: of the gates and the results."""
        self._run = NativeFunction(open_library(LIBRARY), f"state_space_norm_{SUFFIXES[dtype]}", "p", ELEMENTWISE)

    def __call__(
        self, norm: GatedNorm, output: torch.Tensor, squares: torch.Tensor, gate: torch.Tensor, *, is_single: bool
    ) -> torch.Tensor:
        """output: [T, own features] float32; squares: [T, sums]; gate: [T, own features or more]; returns [T, own].

        is_single: whether `output` was rounded to the dtype of the gates, as that of single tokens is.
        """
        groups, (tokens, inner) = norm.groups, output.shape
        if groups.sharers > 1:
            squares = sum_over_ranks(squares)
        out = gate.new_empty(tokens, inner)
        arguments = _Norm(
            output.data_ptr(),
            squares.data_ptr(),
            address(gate),
            None if norm.weight is None else norm.weight.data_ptr(),
            out.data_ptr(),
            gate.stride(0),
            tokens,
            inner,
            groups.sums,
            groups.first,
            groups.own,
            inner * groups.sharers // max(1, groups.own),
            is_single,
            norm.gates_last,
            norm.is_sigmoid,
            norm.rounds_unit,
            norm.epsilon,
        )
        self._run(ctypes.byref(arguments))
        return out
