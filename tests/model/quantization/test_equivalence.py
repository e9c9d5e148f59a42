"""An engine over a quantised checkpoint gives what transformers gives of the same weights made dense, in every mode."""

from __future__ import annotations

from typing import Any

import pytest

from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, check_case
from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import make_prompts, make_reference
from tests.model.quantization.checkpoints import FORMATS, make_quantised

pytestmark = pytest.mark.distributed

# Heads of 8 and, on four ranks, 22 neurons per rank: no slice falls on the blocks, words or groups of the formats.
FEWER_RANKS = [((1, 1), CROWD), ((2, 1), WHOLE), ((1, 2), WHOLE)]
# What else a family has: packed q, k and v; latent attention, whose first projections stay whole; no bias.
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("phi3", {}),
    ("qwen3", {"num_key_value_heads": 2}),
    ("deepseek_v3", {"first_k_dense_replace": 2, "tie_word_embeddings": False}),
]


# Formats that differ little from one that is always tested.
VARIANTS = (
    "fp8-autofp8",
    "fp8-spared",
    "fbgemm",
    "modelopt",
    "gptq-reordered",
    "gptq-8bit-v2",
    "awq-channel",
    "compressed-block",
    "compressed-int4",
    "compressed-int4-reordered",
)


def run(rank_pool: Any, expected: Any, base: tuple[int, int], profile: Profile) -> None:
    check_case(rank_pool, expected, base, profile)


def quantised(folder: Any, family: str, name: str, **changes: Any) -> Any:
    model = make_quantised(tiny_config(family, **changes), folder, FORMATS[name])
    return make_reference(model, folder, make_prompts())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough) if name in VARIANTS else name for name in FORMATS]
)
def test_a_format_equals_its_dense_weights_in_every_mode(name: str, rank_pool: Any, tmp_path: Any) -> None:
    run(rank_pool, quantised(tmp_path, "llama", name), (4, 1), CROWD)


@pytest.mark.parametrize(
    "name",
    [name if name in ("fp8-block", "gptq") else pytest.param(name, marks=pytest.mark.thorough) for name in FORMATS],
)
def test_slices_of_stored_slices(name: str, rank_pool: Any, tmp_path: Any) -> None:
    run(rank_pool, quantised(tmp_path, "llama", name), (2, 2), INNER)


@pytest.mark.parametrize("name", ["fp8-block", pytest.param("gptq", marks=pytest.mark.thorough)])
@pytest.mark.parametrize(("base", "profile"), FEWER_RANKS, ids=["one", "two in sp", "two in tp"])
def test_one_and_two_ranks(name: str, base: Any, profile: Profile, rank_pool: Any, tmp_path: Any) -> None:
    run(rank_pool, quantised(tmp_path, "llama", name), base, profile)


@pytest.mark.parametrize(
    ("family", "changes", "name"),
    [
        pytest.param(*family, name, id=f"{family[0]}-{name}", marks=[] if name in kept else [pytest.mark.thorough])
        for family, kept in zip(FAMILIES, (["fp8-block"], ["gptq-reordered"], ["fp8-block"]), strict=True)
        for name in ("fp8-block", "compressed-channel", "awq", "gptq-reordered")
    ],
)
def test_packed_latent_and_shared_heads(
    family: str, changes: dict[str, Any], name: str, rank_pool: Any, tmp_path: Any
) -> None:
    run(rank_pool, quantised(tmp_path, family, name, **changes), (2, 2), TIGHT)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "heads"),
    [(name, ((6, 3, 48), (10, 2, 80), (3, 3, 48))[turn % 3]) for turn, name in enumerate(FORMATS)],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]} heads",
)
def test_heads_that_do_not_divide_need_no_padding_in_weights(
    name: str, heads: tuple[int, int, int], rank_pool: Any, tmp_path: Any
) -> None:
    """Slices begin and end at the true heads, wherever those lie in blocks, words and groups."""
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": heads[2], "head_dim": 8}
    run(rank_pool, quantised(tmp_path, "llama", name, **sizes), (2, 2), CROWD)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["fp8-block", "compressed-int4-zeros"])
def test_eight_ranks(name: str, rank_pool: Any, tmp_path: Any) -> None:
    run(rank_pool, quantised(tmp_path, "llama", name, num_key_value_heads=2), (4, 2), CROWD)
