"""The choice of experts: the router's product and the likeliest experts of each token in one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.launch import launch

Score = Literal["softmax", "normalised softmax", "sigmoid"]
"""Weights of the chosen experts: probabilities, probabilities that are divided by their sum, or sigmoids of logits."""
TOKENS = 16
"""Tokens per program."""
MOST_TOKENS = 1024
"""Of larger steps a separate product is faster: each program here reads the whole weight."""
MOST_EXPERTS = 256
"""Their logits fit the registers of one program."""


@triton.jit
def choose_tile(scores, num_experts, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, TOP_K: tl.constexpr):
    """Weights, float32, and experts of the `TOP_K` largest of scores [TOKENS, EXPERTS]; of equal ones the first.

    Both are [TOKENS, TOP_K rounded up to a power of two].
    """
    TOKENS: tl.constexpr = scores.shape[0]
    EXPERTS: tl.constexpr = scores.shape[1]
    PLACES: tl.constexpr = triton.next_power_of_2(TOP_K)
    expert = tl.arange(0, EXPERTS)[None, :]
    place = tl.arange(0, PLACES)[None, :]
    if SIGMOID:
        remaining = scores
    else:
        powers = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        remaining = tl.where(expert < num_experts, powers / tl.sum(powers, axis=1)[:, None], float("-inf"))
    weights = tl.zeros([TOKENS, PLACES], tl.float32)
    experts = tl.zeros([TOKENS, PLACES], tl.int32)
    for number in range(TOP_K):
        best = tl.max(remaining, axis=1)[:, None]
        index = tl.min(tl.where(remaining == best, expert, num_experts - 1), axis=1)[:, None]
        weights = tl.where(place == number, best, weights)
        experts = tl.where(place == number, index, experts)
        remaining = tl.where(expert == index, float("-inf"), remaining)
    if SIGMOID:
        weights = 1.0 / (1.0 + tl.exp(-weights))
    if NORMALISE:
        weights = weights / tl.sum(tl.where(place < TOP_K, weights, 0.0), axis=1)[:, None]
    return weights, experts


@triton.jit
def store_choices(
    weights_out, experts_out, weights, experts, token, exists, weights_row, experts_row, TOP_K: tl.constexpr
):
    """Write what `choose_tile` returned for tokens `token`."""
    place = tl.arange(0, weights.shape[1])[None, :]
    inside = exists[:, None] & (place < TOP_K)
    to: tl.constexpr = weights_out.dtype.element_ty
    tl.store(weights_out + token[:, None] * weights_row + place, weights.to(to), mask=inside)
    tl.store(experts_out + token[:, None] * experts_row + place, experts, mask=inside)


@triton.jit
def choose_kernel(
    logits,
    weights_out,
    experts_out,
    logits_row,
    weights_row,
    experts_row,
    num_experts,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """One program per token."""
    token = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    expert = tl.arange(0, EXPERTS)[None, :]
    place = logits + token[:, None] * logits_row + expert
    scores = tl.load(place, mask=expert < num_experts, other=float("-inf")).to(tl.float32)
    weights, experts = choose_tile(scores, num_experts, SIGMOID, NORMALISE, TOP_K)
    store_choices(weights_out, experts_out, weights, experts, token, token >= 0, weights_row, experts_row, TOP_K)


@triton.jit
def route_kernel(
    x,
    router,
    logits_out,
    weights_out,
    experts_out,
    hidden_out,
    num_tokens,
    inputs,
    num_experts,
    x_row,
    router_row,
    weights_row,
    experts_row,
    hidden_row,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOP_K: tl.constexpr,
    COPY: tl.constexpr,
    SCALE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program per `TOKENS` tokens. COPY: writes the tokens to `hidden_out`; SCALE: times their only weight."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    exists, has_expert = token < num_tokens, expert < num_experts
    dtype: tl.constexpr = x.dtype.element_ty
    sums = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for start in range(0, inputs, DEPTH):
        k = start + tl.arange(0, DEPTH)
        has_k = k < inputs
        tile = tl.load(x + token[:, None] * x_row + k[None, :], mask=exists[:, None] & has_k[None, :], other=0.0)
        place = expert[None, :] * router_row + k[:, None]
        weight = tl.load(router + place, mask=has_expert[None, :] & has_k[:, None], other=0.0)
        sums = tl.dot(tile, weight, sums, input_precision="ieee")
    logits = sums.to(dtype)
    inside = exists[:, None] & has_expert[None, :]
    tl.store(logits_out + token[:, None] * num_experts + expert[None, :], logits, mask=inside)
    scores = tl.where(has_expert[None, :], logits.to(tl.float32), float("-inf"))
    weights, experts = choose_tile(scores, num_experts, SIGMOID, NORMALISE, TOP_K)
    if SCALE:
        factor = tl.sum(weights, axis=1)[:, None].to(dtype).to(tl.float32)
        weights = tl.full(weights.shape, 1.0, tl.float32)
    store_choices(weights_out, experts_out, weights, experts, token, exists, weights_row, experts_row, TOP_K)
    if COPY:
        for start in range(0, inputs, DEPTH):
            column = start + tl.arange(0, DEPTH)
            has_value = exists[:, None] & (column < inputs)[None, :]
            values = tl.load(x + token[:, None] * x_row + column[None, :], mask=has_value, other=0.0)
            if SCALE:
                values = (values.to(tl.float32) * factor).to(dtype)
            tl.store(hidden_out + token[:, None] * hidden_row + column[None, :], values, mask=has_value)


@dataclass(frozen=True)
class Choices:
    """The experts of each token."""

    weights: torch.Tensor
    """[t, K], of any dtype and row stride."""
    experts: torch.Tensor
    """[t, K] int32, of any row stride."""

    @staticmethod
    def empty(like: torch.Tensor, num_tokens: int, top_k: int) -> Choices:
        """Memory for weights of the dtype of `like`, and experts."""
        experts = like.new_empty(num_tokens, top_k, dtype=torch.int32)
        return Choices(like.new_empty(num_tokens, top_k), experts)


def can_route(num_tokens: int, num_experts: int) -> bool:
    """Whether `route` serves a step of this size."""
    return num_tokens <= MOST_TOKENS and num_experts <= MOST_EXPERTS


def choose(logits: torch.Tensor, top_k: int, score: Score, choices: Choices | None = None) -> Choices:
    """logits: [t, E], with dense rows; returns the `top_k` likeliest experts, in `choices` if given."""
    tokens, count = logits.shape
    choices = choices or Choices.empty(logits, tokens, top_k)
    constants = _constants(score, top_k, triton.next_power_of_2(count))
    strides = logits.stride(0), choices.weights.stride(0), choices.experts.stride(0)
    launch(
        choose_kernel, (tokens,), logits, choices.weights, choices.experts, *strides, count, num_warps=1, **constants
    )
    return choices


def route(
    x: torch.Tensor,
    router: torch.Tensor,
    top_k: int,
    score: Score,
    choices: Choices | None = None,
    hidden: torch.Tensor | None = None,
    scale: bool = False,
) -> tuple[torch.Tensor, Choices]:
    """x: [t, D]; router: [E, D]; returns logits [t, E] and the choices, in `choices` if given.

    hidden: [t, D], to which x is copied; scale: multiplied by the weight of the token's only expert, which becomes 1.
    """
    tokens, (count, inputs) = len(x), router.shape
    x, router = (each if each.stride(1) == 1 else each.contiguous() for each in (x, router))
    choices, logits = choices or Choices.empty(x, tokens, top_k), x.new_empty(tokens, count)
    experts = max(16, triton.next_power_of_2(count))
    narrow = x.element_size() == 4
    launch(
        route_kernel,
        (triton.cdiv(tokens, TOKENS),),
        x,
        router,
        logits,
        choices.weights,
        choices.experts,
        x if hidden is None else hidden,
        tokens,
        inputs,
        count,
        x.stride(0),
        router.stride(0),
        choices.weights.stride(0),
        choices.experts.stride(0),
        0 if hidden is None else hidden.stride(0),
        **_constants(score, top_k, experts),
        COPY=hidden is not None,
        SCALE=scale,
        TOKENS=TOKENS,
        DEPTH=32 if narrow else min(256, max(32, 8192 // experts)),
        num_warps=4 if experts <= 128 else 8,
        num_stages=1 if narrow else 3,
    )
    return logits, choices


def _constants(score: Score, top_k: int, experts: int) -> dict[str, bool | int]:
    return {
        "SIGMOID": score == "sigmoid",
        "NORMALISE": score == "normalised softmax",
        "TOP_K": top_k,
        "EXPERTS": experts,
    }
