"""Routing in Triton equals torch's softmax, top-k, stable sort and weighted sum."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import use_exact_rounding
from ulysses_infer.kernels.routing import choose, sort_by_expert, sum_of_experts


@pytest.fixture(autouse=True)
def _exact() -> None:
    use_exact_rounding()


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("count", "top_k"), [(6, 2), (128, 8), (5, 1)])
def test_the_likeliest_experts_are_chosen(count: int, top_k: int, normalise: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, count + 3)[:, :count].bfloat16()
    weights, experts = choose(logits, top_k, normalise)
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    expected = probabilities.gather(1, experts)
    torch.testing.assert_close(expected, probabilities.topk(top_k).values, rtol=1e-6, atol=0)
    if normalise:
        expected = expected / expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(weights, expected.bfloat16(), rtol=8e-3, atol=0)
    assert all(len(set(row)) == top_k for row in experts.tolist())


def test_of_equal_experts_the_first_are_chosen() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, float("-inf")], [0.0] * 5])
    assert choose(logits, 2, True)[1].tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize(
    ("first", "own", "tokens"), [(0, 6, 1), (2, 3, 20), (5, 1, 20), pytest.param(2, 3, 700, marks=pytest.mark.thorough)]
)
def test_rows_are_sorted_by_expert_and_summed_again(first: int, own: int, tokens: int) -> None:
    torch.manual_seed(1)
    experts = torch.stack([torch.randperm(6)[:2] for _ in range(tokens)])
    experts[:, 0] = torch.where(experts[:, 1] != 3, 3, experts[:, 0])  # an expert with most of the choices
    counts = torch.full((own,), 10)
    found = sort_by_expert(experts, first, counts)
    flat = torch.where((experts >= first) & (experts < first + own), experts - first, own).reshape(-1)
    order = flat.argsort(stable=True)
    per_expert = torch.bincount(flat, minlength=own + 1)[:own]
    assert found.tokens.tolist() == (order // 2).tolist()
    assert found.offsets.tolist() == per_expert.cumsum(0).tolist()
    assert counts.tolist() == (per_expert + 10).tolist()
    expected_rows = torch.empty_like(order)
    expected_rows[order] = torch.arange(len(order))
    assert found.rows.tolist() == torch.where(flat < own, expected_rows, -1).tolist()

    outputs, weights = torch.randn(2 * tokens, 24).bfloat16(), torch.rand(tokens, 2)
    outputs[int(per_expert.sum()) :] = float("nan")  # rows that no expert writes
    for each in (weights, weights.bfloat16()):
        parts = (outputs[expected_rows] * each.reshape(-1, 1)).masked_fill((flat == own)[:, None], 0)
        expected = parts.view(tokens, 2, 24).sum(dim=1).bfloat16()
        torch.testing.assert_close(sum_of_experts(outputs, each, found.rows), expected, rtol=8e-3, atol=1e-2)
