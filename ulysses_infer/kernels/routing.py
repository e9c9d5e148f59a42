"""Routing of tokens to experts: the order of rows by expert, and the sum over experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.launch import launch
from ulysses_infer.native.sorted_rows import SortedRows

CHOICES = 1024
"""Choices that a sorting program reads at a time."""
COLUMNS = 1024
"""Columns per program of the sum."""


@triton.jit
def relative_expert(experts, choice, num_choices, experts_row, first, own, TOP_K: tl.constexpr):
    """The expert of each choice, counted from the first own one; `own` for the experts of other ranks."""
    place = (choice // TOP_K).to(tl.int64) * experts_row + choice % TOP_K
    expert = tl.load(experts + place, mask=choice < num_choices, other=0).to(tl.int32) - first
    expert = tl.where((expert >= 0) & (expert < own), expert, own)
    return tl.where(choice < num_choices, expert, own + 1)


@triton.jit
def sort_kernel(
    experts,
    offsets,
    counts,
    tokens,
    rows,
    num_choices,
    experts_row,
    first,
    own,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """One program per own expert, and one for all others, whose choices come last. The order is stable."""
    mine = tl.program_id(0)
    before = 0
    count = 0
    for start in range(0, num_choices, CHOICES):
        choice = start + tl.arange(0, CHOICES)
        expert = relative_expert(experts, choice, num_choices, experts_row, first, own, TOP_K)
        before += tl.sum((expert < mine).to(tl.int32), axis=0)
        count += tl.sum((expert == mine).to(tl.int32), axis=0)
    tl.store(offsets + mine, before + count)
    if mine < own:
        tl.store(counts + mine, tl.load(counts + mine) + count)
    for start in range(0, num_choices, CHOICES):
        choice = start + tl.arange(0, CHOICES)
        chosen = relative_expert(experts, choice, num_choices, experts_row, first, own, TOP_K) == mine
        row = before + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(tokens + row, (choice // TOP_K).to(tl.int64), mask=chosen)
        tl.store(rows + choice, tl.where(mine < own, row, -1), mask=chosen)
        before += tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def sum_kernel(
    outputs,
    weights,
    rows,
    added,
    result,
    output_row,
    weights_row,
    width,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    INDEXED: tl.constexpr,
    ADD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program per token and `COLUMNS` columns. Products are rounded to the outputs' dtype unless WIDE.

    Without INDEXED, the rows of a token are consecutive.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < width
    total = tl.zeros([COLUMNS], tl.float32)
    if ADD:
        total = tl.load(added + token * width + column, mask=exists, other=0.0).to(tl.float32)
    for choice in range(TOP_K):
        row = token * TOP_K + choice
        if INDEXED:
            row = tl.load(rows + row).to(tl.int64)
        inside = column < tl.where(row >= 0, width, 0)
        product = tl.load(outputs + row * output_row + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            product *= tl.load(weights + token * weights_row + choice).to(tl.float32)
            if not WIDE:
                product = product.to(outputs.dtype.element_ty).to(tl.float32)
        total += product
    tl.store(result + token * width + column, total.to(result.dtype.element_ty), mask=exists)


def sort_by_expert(experts: torch.Tensor, first: int, counts: torch.Tensor) -> SortedRows:
    """experts: [t, K] integers, of any row stride. first: the first own expert.

    counts: [own experts] int64, the choices are added.
    """
    own, num_choices, top_k = len(counts), experts.numel(), experts.shape[1]
    found = SortedRows.empty(experts, own)
    arguments = (experts, found.offsets, counts, found.tokens, found.rows, num_choices, experts.stride(0), first, own)
    launch(sort_kernel, (own + 1,), *arguments, TOP_K=top_k, CHOICES=CHOICES)
    return found


def take_rows(hidden: torch.Tensor, found: SortedRows) -> torch.Tensor:
    """hidden: [t, H]; returns the rows by expert, [t * K, H]."""
    return hidden.index_select(0, found.tokens)


def sum_of_experts(
    outputs: torch.Tensor,
    weights: torch.Tensor | None,
    rows: torch.Tensor,
    added: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """outputs: [t * K, H], by row; rows: see `SortedRows`; added: [t, H], dense; returns [t, H].

    weights: [t, K], of any row stride; None: 1, with K = 1. dtype: in which torch would multiply, if not the common one
    of outputs and weights.
    """
    if weights is None:
        return _sum(outputs, None, rows, added, 1, False)
    common = torch.promote_types(outputs.dtype, dtype or weights.dtype)
    return _sum(outputs, weights, rows, added, weights.shape[1], common != outputs.dtype)


def sum_of_parts(parts: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
    """parts: [t, n, H], dense; added: [t, H], dense; returns their sum, [t, H]."""
    return _sum(parts.flatten(0, 1), None, None, added, parts.shape[1], False)


def _sum(
    outputs: torch.Tensor,
    weights: torch.Tensor | None,
    rows: torch.Tensor | None,
    added: torch.Tensor | None,
    top_k: int,
    wide: bool,
) -> torch.Tensor:
    width, tokens = outputs.shape[1], len(outputs) // top_k
    result = outputs.new_empty(tokens, width)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    launch(
        sum_kernel,
        (tokens, triton.cdiv(width, columns)),
        outputs,
        outputs if weights is None else weights,
        outputs if rows is None else rows,
        outputs if added is None else added,
        result,
        outputs.stride(0),
        0 if weights is None else weights.stride(0),
        width,
        TOP_K=top_k,
        COLUMNS=columns,
        WEIGHTED=weights is not None,
        INDEXED=rows is not None,
        ADD=added is not None,
        WIDE=wide,
    )
    return result
