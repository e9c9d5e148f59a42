"""Routing of tokens to experts on a CPU, by `native/products/routing.c`: what kernels/routing.py is to a GPU."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch

from ulysses_infer.native.function import ELEMENTWISE, MATMUL, NativeFunction, is_recording
from ulysses_infer.native.library import open_library
from ulysses_infer.native.sorted_rows import SortedRows

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `enum type`
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
MOST_EXPERTS = 1024


class RoutingRule(NamedTuple):
    """How a router chooses the experts of a token from their logits, and weighs them."""

    sigmoid: bool
    """Scores are sigmoids of logits; else probabilities (softmax)."""
    normalise: bool
    """Weights are divided by their sum."""
    groups: int = 0
    """Of consecutive experts, of which the `kept_groups` best are candidates; 0: all experts are."""
    kept_groups: int = 0
    best_of_group: int = 1
    """A group's score is the sum of as many best scores of its experts."""
    scale: float = 1.0
    """Multiplies the weights."""


class _Rule(ctypes.Structure):
    """`struct rule` of routing.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sigmoid", "normalise", "groups", "kept_groups", "best_of_group")),
        ("scale", ctypes.c_double),
    )


def choose(
    logits: torch.Tensor, top_k: int, rule: RoutingRule, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: [t, E], dense; bias: [E] float32, added to the scores that are compared.

    Returns the weights of the chosen experts, [t, K] of `dtype`, and their numbers, [t, K] int64; of equally good
    experts the first.
    """
    rows, count = logits.shape
    weights = logits.new_empty(rows, top_k, dtype=dtype)
    experts = logits.new_empty(rows, top_k, dtype=torch.int64)
    _function("choose_experts", "ppippipiii")(
        ctypes.byref(_Rule(*rule)),
        logits.data_ptr(),
        TYPES[logits.dtype],
        None if bias is None else bias.data_ptr(),
        weights.data_ptr(),
        TYPES[dtype],
        experts.data_ptr(),
        rows,
        count,
        top_k,
    )
    return weights, experts


def wide_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden: [t, D]; weight: [E, D], both bfloat16 or float16 with dense rows; returns [t, E] float32, not rounded."""
    rows, (count, width) = len(hidden), weight.shape
    logits = hidden.new_empty(rows, count, dtype=torch.float32)
    _function(f"logits_{NAMES[hidden.dtype]}", "pppiiiii", MATMUL)(
        hidden.data_ptr(),
        weight.data_ptr(),
        logits.data_ptr(),
        rows,
        count,
        width,
        hidden.stride(0),
        weight.stride(0),
    )
    return logits


def sort_by_expert(experts: torch.Tensor, first: int, counts: torch.Tensor) -> SortedRows:
    """See `kernels.routing.sort_by_expert`. experts: int64 or int32."""
    assert experts.stride(1) == 1 or experts.shape[1] == 1
    found = SortedRows.empty(experts, len(counts))
    _function("sort_by_expert", "piippppiiii")(
        experts.data_ptr(),
        int(experts.dtype == torch.int64),
        experts.stride(0),
        found.offsets.data_ptr(),
        counts.data_ptr(),
        found.tokens.data_ptr(),
        found.rows.data_ptr(),
        *experts.shape,
        first,
        len(counts),
    )
    return found


def take_rows(hidden: torch.Tensor, found: SortedRows) -> torch.Tensor:
    """The rows of own experts: hidden [t, H], with dense rows, by expert. In a recording also those of others."""
    count = len(found.tokens) if is_recording() or len(found.offsets) < 2 else int(found.offsets[-2])
    taken = hidden.new_empty(count, hidden.shape[1])
    size = hidden.element_size()
    _function("take_tokens", "pppiii")(
        taken.data_ptr(),
        hidden.data_ptr(),
        found.tokens.data_ptr(),
        count,
        hidden.shape[1] * size,
        hidden.stride(0) * size,
    )
    return taken


def sum_of_experts(
    outputs: torch.Tensor,
    weights: torch.Tensor | None,
    rows: torch.Tensor,
    added: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See `kernels.routing.sum_of_experts`."""
    top_k = 1 if weights is None else weights.shape[1]
    common = outputs.dtype if weights is None else torch.promote_types(outputs.dtype, dtype or weights.dtype)
    outputs, added = outputs.contiguous(), None if added is None else added.contiguous()
    result = outputs.new_empty(len(rows) // top_k, outputs.shape[1])
    _function(f"sum_of_experts_{NAMES[outputs.dtype]}", "ppiipppiiii")(
        outputs.data_ptr(),
        None if weights is None else weights.data_ptr(),
        0 if weights is None else TYPES[weights.dtype],
        0 if weights is None else weights.stride(0),
        rows.data_ptr(),
        None if added is None else added.data_ptr(),
        result.data_ptr(),
        len(result),
        top_k,
        outputs.shape[1],
        int(common != outputs.dtype),
    )
    return result


@functools.cache
def _function(name: str, arguments: str, kind: str = ELEMENTWISE) -> NativeFunction:
    return NativeFunction(open_library("routing"), name, arguments, kind)
