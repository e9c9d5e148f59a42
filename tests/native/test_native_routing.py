"""The choice of experts, the order of rows by expert and the sum over experts in C, against torch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.native.library import is_available
from ulysses_infer.native.routing import RoutingRule, choose, sort_by_expert, sum_of_experts, take_rows, wide_logits

pytestmark = pytest.mark.skipif(not is_available("routing"), reason="needs a C compiler")
RULES = [
    RoutingRule(sigmoid=False, normalise=False),
    RoutingRule(sigmoid=False, normalise=True, scale=2.5),
    RoutingRule(sigmoid=True, normalise=True, groups=4, kept_groups=2, best_of_group=2),
    RoutingRule(sigmoid=False, normalise=False, groups=4, kept_groups=3, best_of_group=1),
]


def expected_choices(logits: torch.Tensor, top_k: int, rule: RoutingRule, bias: torch.Tensor | None) -> Any:
    """What torch chooses: weights and experts, in any order."""
    scores = logits.float().sigmoid() if rule.sigmoid else logits.float().softmax(-1)
    ranked = scores if bias is None else scores + bias
    if rule.groups:
        best = ranked.view(len(logits), rule.groups, -1).topk(rule.best_of_group).values.sum(-1)
        kept = torch.zeros_like(best).scatter_(1, best.topk(rule.kept_groups).indices, 1.0)
        mask = kept.repeat_interleave(logits.shape[1] // rule.groups, dim=1) == 0
        ranked = ranked.masked_fill(mask, float("-inf"))
    experts = ranked.topk(top_k).indices
    weights = scores.gather(1, experts)
    return (weights / weights.sum(-1, keepdim=True) if rule.normalise else weights) * rule.scale, experts


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_the_best_experts_are_chosen(rule: RoutingRule, dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(0)
    order = torch.stack([torch.randperm(24) for _ in range(9)])  # no two of a token are equal
    logits = ((order - 12) / 4.0).to(dtype)
    bias = torch.randn(24) * 0.1 if biased else None
    weights, experts = choose(logits, 5, rule, bias, torch.float32)
    expected, chosen = expected_choices(logits, 5, rule, bias)
    assert torch.equal(experts.sort().values, chosen.sort().values)
    torch.testing.assert_close(weights.sort().values, expected.sort().values)


def test_weights_are_rounded_to_the_dtype_that_is_asked_for() -> None:
    logits = torch.randn(3, 8)
    exact, experts = choose(logits, 2, RULES[0], None, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        found, same = choose(logits, 2, RULES[0], None, dtype)
        assert torch.equal(found, exact.to(dtype))
        assert torch.equal(same, experts)


def test_logits_that_are_not_numbers_still_give_experts() -> None:
    _, experts = choose(torch.full((2, 8), float("nan")), 3, RULES[2], None, torch.float32)
    assert ((experts >= 0) & (experts < 8)).all()


def test_wide_logits_are_not_rounded() -> None:
    x, weight = torch.randn(5, 75).bfloat16(), torch.randn(9, 75).bfloat16()
    found = wide_logits(x, weight)
    torch.testing.assert_close(found, x.float() @ weight.float().t())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 7), st.integers(0, 3), st.booleans(), st.integers(0, 2**31))
def test_rows_are_in_the_order_of_their_experts(
    tokens: int, top_k: int, own: int, first: int, is_wide: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.int64 if is_wide else torch.int32
    experts = torch.randint(0, own + first + 2, (tokens, top_k + 2), generator=generator).to(dtype)[:, 2:]
    counts = torch.ones(own, dtype=torch.int64)
    found = sort_by_expert(experts, first, counts)
    relative = experts.long() - first
    relative = torch.where((relative >= 0) & (relative < own), relative, own).flatten()
    order = relative.sort(stable=True).indices
    expected = torch.bincount(relative, minlength=own + 1)
    assert torch.equal(found.offsets.long(), expected.cumsum(0))
    assert torch.equal(counts, expected[:own] + 1)
    assert torch.equal(found.tokens, order // top_k)
    rows = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
    assert torch.equal(found.rows.long(), torch.where(relative < own, rows, -1))
    hidden = torch.randn(max(tokens, 1), 6)[:, 1:5]
    assert torch.equal(take_rows(hidden, found), hidden[found.tokens[: expected[:own].sum()]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights_dtype", [torch.float32, None], ids=str)
@pytest.mark.parametrize("has_added", [False, True])
def test_the_sum_over_experts(dtype: torch.dtype, weights_dtype: torch.dtype | None, has_added: bool) -> None:
    torch.manual_seed(1)
    tokens, top_k, width = 7, 3, 45
    outputs, weights = (
        torch.randn(tokens * top_k, width).to(dtype),
        torch.rand(tokens, top_k).to(weights_dtype or dtype),
    )
    rows = torch.randperm(tokens * top_k).to(torch.int32)
    rows[::5] = -1
    added = torch.randn(tokens, width).to(dtype) if has_added else None
    found = sum_of_experts(outputs, weights, rows, added)
    parts = (outputs[rows.long()] * weights.flatten()[:, None]).masked_fill((rows < 0)[:, None], 0)
    total = parts.view(tokens, top_k, width).float().sum(1) + (0 if added is None else added.float())
    torch.testing.assert_close(found, total.to(dtype))


def test_without_weights_each_token_has_one_row() -> None:
    outputs, rows = torch.randn(4, 5), torch.tensor([2, -1, 0], dtype=torch.int32)
    expected = torch.stack([outputs[2], torch.zeros(5), outputs[0]])
    assert torch.equal(sum_of_experts(outputs, None, rows), expected)
