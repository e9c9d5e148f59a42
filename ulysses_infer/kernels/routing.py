"""Routing of tokens to experts: the choice of experts, the order of rows by expert, and the sum over experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.launch import launch

CHOICES = 1024
"""Choices that a sorting program reads at a time."""
COLUMNS = 1024
"""Columns per program of the sum."""


@triton.jit
def choose_kernel(
    logits,
    weights,
    experts,
    logits_row,
    num_experts,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """One program per token: softmax over all experts, then the `TOP_K` largest; of equal ones the first."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    scores = tl.load(logits + token * logits_row + expert, mask=inside, other=float("-inf")).to(tl.float32)
    powers = tl.exp(scores - tl.max(scores, axis=0))
    remaining = tl.where(inside, powers / tl.sum(powers, axis=0), -1.0)
    place = tl.arange(0, TOP_K)
    values = tl.zeros([TOP_K], tl.float32)
    for number in range(TOP_K):
        best = tl.max(remaining, axis=0)
        index = tl.min(tl.where(remaining == best, expert, EXPERTS), axis=0)
        values = tl.where(place == number, best, values)
        tl.store(experts + token * TOP_K + number, index.to(tl.int64))
        remaining = tl.where(expert == index, -1.0, remaining)
    if NORMALISE:
        values = values / tl.sum(values, axis=0)
    tl.store(weights + token * TOP_K + place, values.to(weights.dtype.element_ty))


@triton.jit
def relative_expert(experts, choice, num_choices, first, own):
    """The expert of each choice, counted from the first own one; `own` for the experts of other ranks."""
    expert = tl.load(experts + choice, mask=choice < num_choices, other=0) - first
    expert = tl.where((expert >= 0) & (expert < own), expert, own)
    return tl.where(choice < num_choices, expert, own + 1)


@triton.jit
def sort_kernel(
    experts, offsets, counts, tokens, rows, num_choices, first, own, TOP_K: tl.constexpr, CHOICES: tl.constexpr
):
    """One program per own expert, and one for all others, whose choices come last. The order is stable."""
    mine = tl.program_id(0)
    before = 0
    count = 0
    for start in range(0, num_choices, CHOICES):
        expert = relative_expert(experts, start + tl.arange(0, CHOICES), num_choices, first, own)
        before += tl.sum((expert < mine).to(tl.int32), axis=0)
        count += tl.sum((expert == mine).to(tl.int32), axis=0)
    if mine < own:
        tl.store(offsets + mine, before + count)
        tl.store(counts + mine, tl.load(counts + mine) + count)
    for start in range(0, num_choices, CHOICES):
        choice = start + tl.arange(0, CHOICES)
        chosen = relative_expert(experts, choice, num_choices, first, own) == mine
        row = before + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(tokens + row, (choice // TOP_K).to(tl.int64), mask=chosen)
        tl.store(rows + choice, tl.where(mine < own, row, -1), mask=chosen)
        before += tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def sum_kernel(
    outputs, weights, rows, result, output_row, width, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """One program per token and `COLUMNS` columns. Products are rounded to the outputs' dtype unless WIDE."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < width
    total = tl.zeros([COLUMNS], tl.float32)
    for choice in range(TOP_K):
        row = tl.load(rows + token * TOP_K + choice).to(tl.int64)
        weight = tl.load(weights + token * TOP_K + choice).to(tl.float32)
        inside = column < tl.where(row >= 0, width, 0)
        product = tl.load(outputs + row * output_row + column, mask=inside, other=0.0).to(tl.float32) * weight
        if not WIDE:
            product = product.to(outputs.dtype.element_ty).to(tl.float32)
        total += product
    tl.store(result + token * width + column, total.to(result.dtype.element_ty), mask=exists)


def choose(logits: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: [t, E]; returns the probabilities of the `top_k` likeliest experts, [t, K], and the experts, int64.

    top_k must be a power of two. normalise: the probabilities of a token sum to 1.
    """
    tokens, count = logits.shape
    weights, experts = logits.new_empty(tokens, top_k), logits.new_empty(tokens, top_k, dtype=torch.int64)
    constants = {"TOP_K": top_k, "EXPERTS": triton.next_power_of_2(count), "NORMALISE": normalise}
    launch(choose_kernel, (tokens,), logits, weights, experts, logits.stride(0), count, num_warps=1, **constants)
    return weights, experts


@dataclass(frozen=True)
class SortedRows:
    """A row per choice, those of one expert after another's; the last are of experts that other ranks own."""

    offsets: torch.Tensor
    """[own experts] int32: where the rows of each end."""
    tokens: torch.Tensor
    """[t * K] int64: the token of each row."""
    rows: torch.Tensor
    """[t * K] int32: the row of each choice; -1 if another rank owns its expert."""


def sort_by_expert(experts: torch.Tensor, first: int, counts: torch.Tensor) -> SortedRows:
    """experts: [t, K] int64, dense. first: the first own expert. counts: [own experts] int64, the choices are added."""
    own, num_choices = len(counts), experts.numel()
    found = SortedRows(
        experts.new_empty(own, dtype=torch.int32),
        experts.new_empty(num_choices),
        experts.new_empty(num_choices, dtype=torch.int32),
    )
    arguments = (experts, found.offsets, counts, found.tokens, found.rows, num_choices, first, own)
    launch(sort_kernel, (own + 1,), *arguments, TOP_K=experts.shape[1], CHOICES=CHOICES)
    return found


def sum_of_experts(outputs: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """outputs: [t * K, H], by row; weights: [t, K], dense; rows: see `SortedRows`; returns [t, H]."""
    tokens, top_k = weights.shape
    result, width = outputs.new_empty(tokens, outputs.shape[1]), outputs.shape[1]
    columns = min(COLUMNS, triton.next_power_of_2(width))
    wide = torch.promote_types(outputs.dtype, weights.dtype) != outputs.dtype
    launch(
        sum_kernel,
        (tokens, triton.cdiv(width, columns)),
        outputs,
        weights,
        rows,
        result,
        outputs.stride(0),
        width,
        TOP_K=top_k,
        COLUMNS=columns,
        WIDE=wide,
    )
    return result
