"""A layer of a decode step takes few launches, in every mode: a regression of fusion fails here."""

from __future__ import annotations

import pytest

from benchmarks.kernel_budget import budgets

LIMITS = {
    "llama-3.3-70b-fp8-8xh200": 11,
    "qwen3-32b-fp8-8xh200": 11,
    "qwen3-8b-2x24gb": 11,
    "qwen3-30b-a3b-8xh200": 12,
    "llama-4-scout-17b-16e-8xh200": 12,
}


@pytest.mark.parametrize(
    "recipe",
    [
        "llama-3.3-70b-fp8-8xh200",
        "qwen3-30b-a3b-8xh200",
        *(
            pytest.param(recipe, marks=pytest.mark.thorough)
            for recipe in LIMITS
            if "70b" not in recipe and "a3b" not in recipe
        ),
    ],
)
def test_launches_stay_within_the_budget(recipe: str) -> None:
    pytest.importorskip("triton")
    found = list(budgets(recipe))
    assert {each.mode.sp for each in found} >= {1}
    assert len(found) >= 2
    for each in found:
        assert each.launches <= LIMITS[recipe], each
        assert each.unfused > 1.5 * each.launches, "what the fusion saves"
