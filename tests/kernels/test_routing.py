"""Routing in Triton equals torch's softmax, top-k, stable sort and weighted sum."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import use_exact_rounding
from ulysses_infer.kernels.router import Choices, Score, choose, route
from ulysses_infer.kernels.routing import sort_by_expert, sum_of_experts, sum_of_parts

SCORES = ["softmax", "normalised softmax", "sigmoid"]


@pytest.fixture(autouse=True)
def _exact() -> None:
    use_exact_rounding()


def expected_choices(logits: torch.Tensor, experts: torch.Tensor, score: str) -> torch.Tensor:
    """The weights of `experts`, which must be the likeliest, of the logits' dtype."""
    values = logits.float().sigmoid() if score == "sigmoid" else torch.softmax(logits, dim=-1, dtype=torch.float32)
    top_k = experts.shape[1]
    expected = values.gather(1, experts.long())
    torch.testing.assert_close(expected, values.topk(top_k).values, rtol=1e-6, atol=0)
    assert all(len(set(row)) == top_k for row in experts.tolist())
    if score == "normalised softmax":
        expected = expected / expected.sum(dim=-1, keepdim=True)
    return expected.to(logits.dtype)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("count", "top_k"), [(6, 2), (128, 8), (5, 1), (60, 6)])
def test_the_likeliest_experts_are_chosen(count: int, top_k: int, score: Score) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, count + 3)[:, :count].bfloat16()
    found = choose(logits, top_k, score)
    torch.testing.assert_close(found.weights, expected_choices(logits, found.experts, score), rtol=8e-3, atol=0)


def test_of_equal_experts_the_first_are_chosen() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, float("-inf")], [0.0] * 5])
    assert choose(logits, 2, "normalised softmax").experts.tolist() == [[1, 2], [0, 1]]


def test_what_is_no_number_chooses_an_expert_that_exists() -> None:
    logits = torch.full((1, 5), float("nan"))
    assert choose(logits, 2, "softmax").experts.tolist() == [[4, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("count", "top_k", "tokens"), [(6, 2, 1), (128, 8, 3), (20, 3, 19)])
def test_routing_is_the_product_and_the_choice(
    count: int, top_k: int, tokens: int, score: Score, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, router = torch.randn(tokens, 100)[:, :72].to(dtype), torch.randn(count, 72).to(dtype) / 8
    logits, found = route(x, router, top_k, score)
    torch.testing.assert_close(logits, torch.nn.functional.linear(x, router), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.weights, expected_choices(logits, found.experts, score), rtol=8e-3, atol=0)


@pytest.mark.parametrize("scale", [False, True])
def test_routed_tokens_are_packed(scale: bool) -> None:
    """Beside their weights and experts, in one row each; llama4's are multiplied by the score of their expert."""
    torch.manual_seed(0)
    x, router = torch.randn(5, 64).bfloat16(), torch.randn(6, 64).bfloat16()
    packed = torch.zeros(5, 64 + 8, dtype=torch.bfloat16)
    weights, experts = packed.view(torch.float32)[:, 32:33], packed.view(torch.int32)[:, 34:35]
    logits, _ = route(x, router, 1, "sigmoid", Choices(weights, experts), packed[:, :64], scale)
    assert experts[:, 0].tolist() == logits.argmax(dim=1).tolist()
    scores = logits.float().amax(dim=1, keepdim=True).sigmoid()
    assert torch.equal(packed[:, :64], x * scores.bfloat16() if scale else x)
    torch.testing.assert_close(weights, torch.ones(5, 1) if scale else scores)


@pytest.mark.parametrize(
    ("first", "own", "tokens"), [(0, 6, 1), (2, 3, 20), (5, 1, 20), pytest.param(2, 3, 700, marks=pytest.mark.thorough)]
)
def test_rows_are_sorted_by_expert_and_summed_again(first: int, own: int, tokens: int) -> None:
    torch.manual_seed(1)
    experts = torch.stack([torch.randperm(6)[:2] for _ in range(tokens)])
    experts[:, 0] = torch.where(experts[:, 1] != 3, 3, experts[:, 0])  # an expert with most of the choices
    counts = torch.full((own,), 10)
    strided = torch.full((tokens, 5), -7)
    strided[:, 1:3] = experts
    found = sort_by_expert(strided[:, 1:3], first, counts)
    flat = torch.where((experts >= first) & (experts < first + own), experts - first, own).reshape(-1)
    order = flat.argsort(stable=True)
    per_expert = torch.bincount(flat, minlength=own + 1)[:own]
    assert found.tokens.tolist() == (order // 2).tolist()
    assert found.ends.tolist() == per_expert.cumsum(0).tolist()
    assert found.offsets[-1] == 2 * tokens
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
        added = torch.randn(tokens, 24).bfloat16()
        both = sum_of_experts(outputs, each, found.rows, added)
        torch.testing.assert_close(both, expected + added, rtol=8e-3, atol=4e-2)


def test_rows_of_one_expert_each_are_taken_as_they_are() -> None:
    outputs, rows = torch.randn(3, 24), torch.tensor([2, -1, 0], dtype=torch.int32)
    expected = torch.stack([outputs[2], torch.zeros(24), outputs[0]])
    assert torch.equal(sum_of_experts(outputs, None, rows), expected)


@pytest.mark.parametrize("count", [1, 4, 3])
def test_parts_of_several_ranks_are_summed(count: int) -> None:
    parts, added = torch.randn(3, count, 24), torch.randn(3, 24)
    torch.testing.assert_close(sum_of_parts(parts), parts.sum(dim=1))
    torch.testing.assert_close(sum_of_parts(parts, added), parts.sum(dim=1) + added)
