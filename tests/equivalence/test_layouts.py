"""Uncommon layouts: few and many key/value heads, three and eight ranks, features of single architectures."""

from __future__ import annotations

from typing import Any

import pytest

from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, check, run_case
from tests.equivalence.families import FEATURES
from tests.equivalence.tiny_models import NEW_TOKENS
from tests.selection import diagonal

pytestmark = pytest.mark.distributed


def run(rank_pool: Any, expected: Any, base: tuple[int, int], profile: Profile) -> None:
    """The engine on `base` against transformers."""
    pool = rank_pool(base[0] * base[1])
    outcomes = pool.run(run_case, expected.folder, base, profile, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))


@pytest.mark.parametrize(
    ("key_value_heads", "family", "base"),
    diagonal([1, 2, 8], ["llama", "phi3", "gpt_oss"], [(4, 1), (2, 2), (1, 4)]),
)
def test_key_value_heads_are_replicated_or_split(
    key_value_heads: int, family: str, base: tuple[int, int], rank_pool: Any, reference: Any
) -> None:
    run(rank_pool, reference(family, num_key_value_heads=key_value_heads), base, CROWD)


@pytest.mark.parametrize(
    ("family", "key_value_heads", "base", "profile"),
    [
        ("llama", 1, (8, 1), CROWD),
        ("llama", 2, (4, 2), INNER),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in (
                ("qwen3_moe", 4, (8, 1), TIGHT),
                ("gemma2", 4, (2, 4), INNER),
                ("gpt_oss", 8, (1, 8), WHOLE),
                ("olmo2", 2, (4, 2), CROWD),
            )
        ),
    ],
    ids=lambda value: getattr(value, "name", str(value).replace(" ", "")),
)
def test_eight_ranks(
    family: str, key_value_heads: int, base: tuple[int, int], profile: Profile, rank_pool: Any, reference: Any
) -> None:
    run(rank_pool, reference(family, num_key_value_heads=key_value_heads), base, profile)


@pytest.mark.parametrize("model_type", FEATURES)
def test_features_of_other_families(model_type: str, rank_pool: Any, reference: Any) -> None:
    run(rank_pool, reference(model_type), (2, 2), CROWD)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "sizes", "base"),
    [
        ("llama", {"intermediate_size": 3}, (2, 2)),
        ("llama", {"intermediate_size": 3}, (1, 4)),
        ("phi3", {"intermediate_size": 5}, (1, 4)),
        ("gpt2", {"n_inner": 7}, (2, 2)),
    ],
    ids=str,
)
def test_few_neurons(family: str, sizes: dict[str, int], base: tuple[int, int], rank_pool: Any, reference: Any) -> None:
    run(rank_pool, reference(family, **sizes), base, CROWD)


@pytest.mark.parametrize("base", [(3, 1), (1, 3)], ids=lambda base: f"sp{base[0]}xtp{base[1]}")
def test_three_ranks(base: tuple[int, int], rank_pool: Any, reference: Any) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 50}
    run(rank_pool, reference("llama", **sizes), base, CROWD)
