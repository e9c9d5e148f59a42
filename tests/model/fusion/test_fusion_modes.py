"""On several ranks, without fusion and with stacked weights: transformers' tokens and log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.equivalence.cases import CROWD, INNER, Profile, check, run_case
from tests.equivalence.conftest import reference as reference
from tests.equivalence.tiny_models import NEW_TOKENS
from tests.selection import diagonal

pytestmark = pytest.mark.distributed
BASES = [(2, 1), (4, 1), (2, 2)]
UNFUSED = {"runtime": {"threads_per_rank": 1, "device": "cpu", "debug": True, "fuse": False}}


def run_stacked(folder: Path, base: tuple[int, int], profile: Profile, prompts: list[list[int]], count: int) -> Any:
    """On a rank: `run_case` with weights that multiply the same input in one tensor, as on a GPU."""
    with mock.patch("ulysses_infer.model.fusion.fuse.should_stack_weights", return_value=True):
        return run_case(folder, base, profile, prompts, count)


def run(rank_pool: Any, function: Any, expected: Any, base: tuple[int, int], profile: Profile) -> None:
    """`function` on every rank of `base`, against transformers."""
    outcomes = rank_pool(base[0] * base[1]).run(function, expected.folder, base, profile, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))


@pytest.mark.parametrize(
    "family", [*(pytest.param(name, marks=pytest.mark.thorough) for name in ("llama", "qwen3")), "gemma2"]
)
def test_fusion_can_be_switched_off(family: str, rank_pool: Any, reference: Any) -> None:
    run(rank_pool, run_case, reference(family), (2, 2), replace(CROWD, settings=UNFUSED))


@pytest.mark.parametrize(("base", "family"), diagonal(BASES, ["llama", "qwen2", "qwen3", "gemma2"]))
def test_stacked_weights(base: tuple[int, int], family: str, rank_pool: Any, reference: Any) -> None:
    profile = INNER if base == (2, 2) else CROWD
    run(rank_pool, run_stacked, reference(family), base, profile)


@pytest.mark.thorough
@pytest.mark.parametrize("base", [(2, 1), (1, 2), (2, 2), (1, 4)], ids=str)
def test_stacked_weights_with_heads_that_do_not_divide(base: tuple[int, int], rank_pool: Any, reference: Any) -> None:
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}
    run(rank_pool, run_stacked, reference("llama", **sizes), base, CROWD)


@pytest.mark.parametrize("key_value_heads", [1, pytest.param(2, marks=pytest.mark.thorough), 8])
def test_stacked_weights_with_few_or_many_key_value_heads(key_value_heads: int, rank_pool: Any, reference: Any) -> None:
    run(rank_pool, run_stacked, reference("llama", num_key_value_heads=key_value_heads), (4, 1), CROWD)
