"""Quantised experts in every placement and mode: transformers' answers of the same weights made dense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, check, run_case
from tests.equivalence.families import with_experts
from tests.equivalence.tiny_models import NEW_TOKENS, make_prompts, make_reference
from tests.model.quantization.mixtures import MIXTURES, make_mixture

pytestmark = pytest.mark.distributed
PLACEMENTS = ("expert", "width", "replicate")
# The placements in which each format is always tested; the rest is thorough.
ALWAYS = {
    "qwen3-fp8": ("expert", "width"),
    "gpt-oss-mxfp4": ("expert",),
    "deepseek-fp8": ("replicate",),
    "llama4-fbgemm": ("width",),
    "llama4-compressed": ("expert",),
    "qwen3-awq": ("width",),
    "mixtral-gptq-reordered": ("replicate",),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`reference(name, num_experts)`: a checkpoint, made once, and transformers' answers with its dense weights."""
    made: dict[tuple[str, int], Any] = {}

    def get(name: str, num_experts: int) -> Any:
        if (name, num_experts) not in made:
            folder, mixture = tmp_path_factory.mktemp(name), MIXTURES[name]
            model = make_mixture(folder, mixture, **with_experts(mixture.family, num_experts))
            made[name, num_experts] = make_reference(model, folder, make_prompts())
        return made[name, num_experts]

    return get


def run(rank_pool: Any, expected: Any, placement: str, base: tuple[int, int], profile: Profile) -> None:
    placed = replace(profile, settings={"parallel.expert_placement": placement})
    outcomes = rank_pool(base[0] * base[1]).run(run_case, expected.folder, base, placed, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))


def cases() -> list[Any]:
    """Every format in every placement on two ranks or four."""
    chosen = []
    for turn, name in enumerate(MIXTURES):
        for other, placement in enumerate(PLACEMENTS):
            always = placement in ALWAYS.get(name, ())
            for base in dict.fromkeys([*[(2, 1)] * always, ((2, 1), (4, 1), (2, 2))[(turn + other) % 3]]):
                is_default = base == (2, 1) and always
                marks = [] if is_default else [pytest.mark.thorough]
                profile = (CROWD, WHOLE, TIGHT)[(turn + other) % 3] if base != (2, 2) else INNER
                identity = f"{name}-{placement}-sp{base[0]}xtp{base[1]}"
                chosen.append(pytest.param(name, placement, base, profile, marks=marks, id=identity))
    return chosen


@pytest.mark.parametrize(("name", "placement", "base", "profile"), cases())
def test_quantised_experts_answer_as_their_dense_weights_do(
    name: str, placement: str, base: tuple[int, int], profile: Profile, rank_pool: Any, reference: Any
) -> None:
    num_experts = 5 if placement == "expert" and MIXTURES[name].family == "qwen3_moe" else 4
    run(rank_pool, reference(name, num_experts), placement, base, profile)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "placement", "base"),
    [
        ("qwen3-fp8", "expert", (4, 2)),  # fewer experts than ranks
        ("qwen3-fp8", "replicate", (8, 1)),
        ("gpt-oss-mxfp4", "width", (8, 1)),
        ("llama4-fbgemm", "replicate", (2, 4)),
        ("qwen3-awq", "width", (4, 2)),
    ],
    ids=str,
)
def test_eight_ranks(name: str, placement: str, base: tuple[int, int], rank_pool: Any, reference: Any) -> None:
    run(rank_pool, reference(name, 4), placement, base, CROWD)
