"""Numbers of heads that do not divide over the ranks, against transformers, in every mode of every base."""

from __future__ import annotations

from typing import Any

import pytest

from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, check_case

pytestmark = pytest.mark.distributed


def run(rank_pool: Any, expected: Any, base: tuple[int, int], profile: Profile) -> list[Any]:
    """The engine on `base` against transformers."""
    return check_case(rank_pool, expected, base, profile)


def heads(query: int, key_value: int, width: int) -> dict[str, int]:
    """The sizes of a model with these heads."""
    return {"num_attention_heads": query, "num_key_value_heads": key_value, "hidden_size": query * width}


def thorough(*values: Any) -> Any:
    """A case that does not run by default."""
    return pytest.param(*values, marks=pytest.mark.thorough)


QWEN_7B, SMOLLM, QWEN_05B, FALCON = heads(28, 4, 8), heads(9, 3, 8), heads(14, 2, 8), heads(71, 1, 4)


@pytest.mark.parametrize(
    ("family", "sizes", "base", "profile"),
    [
        ("llama", SMOLLM, (2, 1), CROWD),
        thorough("llama", SMOLLM, (1, 2), TIGHT),
        ("qwen2", QWEN_05B, (2, 2), CROWD),
        thorough("qwen2", QWEN_05B, (4, 1), INNER),
        thorough("qwen2", QWEN_05B, (1, 4), WHOLE),
        thorough("qwen2", QWEN_7B, (8, 1), CROWD),
        thorough("qwen2", QWEN_7B, (4, 2), INNER),
        thorough("qwen2", QWEN_7B, (2, 4), TIGHT),
        thorough("qwen2", QWEN_7B, (1, 8), WHOLE),
        thorough("llama", FALCON, (8, 1), TIGHT),
        thorough("llama", FALCON, (2, 4), INNER),
    ],
    ids=lambda value: getattr(value, "name", str(value) if isinstance(value, str | tuple) else ""),
)
def test_heads_of_models_that_people_run(
    family: str, sizes: dict[str, int], base: tuple[int, int], profile: Profile, rank_pool: Any, reference: Any
) -> None:
    run(rank_pool, reference(family, **sizes), base, profile)


@pytest.mark.thorough
@pytest.mark.parametrize("base", [(4, 1), (2, 2)], ids=lambda base: f"sp{base[0]}xtp{base[1]}")
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("phi3", heads(6, 3, 8)),  # packed projections
        ("gpt_neox", heads(5, 5, 8)),  # packed by head
        ("gpt_neox", heads(3, 3, 16)),  # fewer heads than ranks
        ("gpt2", {"n_embd": 40, "n_head": 5, "hidden_size": None, "num_attention_heads": None}),
        ("olmo2", {**heads(10, 5, 8)}),  # norms over all heads
        ("gpt_oss", {**heads(10, 2, 16), "head_dim": 16}),  # sinks
        ("gemma2", {**heads(6, 3, 16), "head_dim": 16}),
        ("cohere", heads(9, 3, 8)),  # a norm with weights of its own for every head
        ("beam", {**heads(6, 2, 16), "head_dim": 16}),  # one bias per head
        ("bitnet", heads(6, 2, 8)),  # a norm over the heads' outputs
        ("qwen3_moe", {**heads(6, 2, 16), "head_dim": 16}),
        ("llama", heads(3, 1, 8)),  # fewer heads than ranks
        ("llama", heads(3, 3, 8)),
        ("llama", heads(2, 2, 8)),
        ("olmo2", heads(3, 3, 8)),
        ("deepseek_v3", {"num_attention_heads": 6, "num_key_value_heads": 6}),  # latents
        ("deepseek_v2", heads(3, 3, 16)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.get('num_attention_heads')}",
)
def test_every_kind_of_attention_weight(
    family: str, sizes: dict[str, Any], base: tuple[int, int], rank_pool: Any, reference: Any
) -> None:
    run(rank_pool, reference(family, **sizes), base, CROWD)
