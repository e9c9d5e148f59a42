"""Mixtures of experts in every placement: transformers' tokens and log-probabilities, whatever the mode of a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, bases, check, run_case
from tests.equivalence.families import EXPERT_FAMILIES, with_experts
from tests.equivalence.tiny_models import NEW_TOKENS
from tests.selection import diagonal

pytestmark = pytest.mark.distributed
BASES = [base for world_size in (2, 4) for base in bases(world_size)]


def run_dispatching(*arguments: Any) -> Any:
    """`run_case` with tokens sent to the owners of their experts, although steps this small do not pay for it."""
    from ulysses_infer.parallel import experts

    usual, experts.DISPATCH_BYTES = experts.DISPATCH_BYTES, -1
    try:
        return run_case(*arguments)
    finally:
        experts.DISPATCH_BYTES = usual


def cases() -> list[Any]:
    """Every family in every placement on half of the bases, with alternating profiles; by default one in six."""
    chosen, turn = [], 0
    for family in EXPERT_FAMILIES:
        for placement in ("expert", "width", "replicate"):
            for base in BASES if placement != "replicate" else [(2, 2)]:
                turn += 1
                profile = (CROWD, WHOLE, TIGHT, INNER if base == (2, 2) else CROWD)[turn % 4]
                uneven = placement == "expert" and turn % 2 == 0 and family != "deepseek_v3"  # its groups are equal
                name = f"{family}-{placement}-sp{base[0]}xtp{base[1]}-{profile.name}{'-uneven' if uneven else ''}"
                is_default = turn % 12 == 0
                if not is_default and turn % 5 in (0, 2, 4):
                    continue
                marks = [] if is_default else [pytest.mark.thorough]
                chosen.append(pytest.param(family, placement, base, profile, 5 if uneven else 4, id=name, marks=marks))
    return chosen


def run(
    pools: Any, expected: Any, placement: str, base: tuple[int, int], profile: Profile, function: Any = run_case
) -> list[Any]:
    settings = {"parallel.expert_placement": placement}
    settings |= {"runtime.collectives": "torch"} if function is run_dispatching else {}
    placed = replace(profile, settings=settings)
    folder: Path = expected.folder
    outcomes = pools(base[0] * base[1]).run(function, folder, base, placed, expected.prompts, NEW_TOKENS)
    num_modes = sum(base[0] % sp == 0 for sp in range(1, base[0] + 1))
    check(outcomes, expected, profile, num_modes)
    return outcomes  # type: ignore[no-any-return]


@pytest.mark.parametrize(("family", "placement", "base", "profile", "num_experts"), cases())
def test_every_placement_gives_correct_answers(
    family: str,
    placement: str,
    base: tuple[int, int],
    profile: Profile,
    num_experts: int,
    rank_pool: Any,
    reference: Any,
) -> None:
    run(rank_pool, reference(family, **with_experts(family, num_experts)), placement, base, profile)


@pytest.mark.parametrize(
    ("family", "base"), diagonal(["qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3"], [(2, 1), (4, 1), (2, 2)])
)
def test_tokens_sent_to_the_owners_of_their_experts_give_correct_answers(
    family: str, base: tuple[int, int], rank_pool: Any, reference: Any
) -> None:
    expected = reference(family, **with_experts(family, 4))
    run(rank_pool, expected, "expert", base, INNER if base == (2, 2) else CROWD, run_dispatching)


@pytest.mark.parametrize(
    ("family", "num_experts", "placement", "base", "function"),
    [
        ("mixtral", 4, "expert", (4, 2), run_case),  # fewer experts than ranks
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in (
                ("gpt_oss", 10, "expert", (2, 4), run_dispatching),
                ("llama4_text", 8, "width", (4, 2), run_case),
                ("qwen3_moe", 12, "expert", (8, 1), run_dispatching),
                ("qwen2_moe", 4, "width", (8, 1), run_case),
                ("deepseek_v2", 4, "expert", (1, 8), run_case),
                ("olmoe", 8, "width", (2, 4), run_case),
                ("granitemoe", 9, "expert", (8, 1), run_case),
                ("deepseek_v3", 16, "expert", (4, 2), run_dispatching),
                ("glm4_moe", 8, "width", (8, 1), run_case),
                ("ernie4_5_moe", 6, "expert", (4, 2), run_dispatching),
                ("minimax_m2", 8, "replicate", (2, 4), run_case),
            )
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value).replace(" ", "")),
)
def test_eight_ranks(
    family: str, num_experts: int, placement: str, base: tuple[int, int], function: Any, rank_pool: Any, reference: Any
) -> None:
    run(rank_pool, reference(family, **with_experts(family, num_experts)), placement, base, CROWD, function)
