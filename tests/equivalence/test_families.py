"""Every family, on every base of 1, 2 and 4 ranks, gives transformers' tokens and log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest

from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, bases, check, layouts, run_case
from tests.equivalence.families import FAMILIES
from tests.equivalence.tiny_models import NEW_TOKENS

pytestmark = pytest.mark.distributed
DEFAULT_FAMILIES = ("llama", "qwen3_moe", "gemma2")
DEFAULT_BASES = ((1, 2), (4, 1), (2, 2))


def cases() -> list[Any]:
    """Every family on most bases with alternating profiles; llama on every base with all of them.

    By default three families run on three bases and every other family on one base.
    """
    chosen = []
    for turn, family in enumerate(FAMILIES):
        for number, base in enumerate(bases_of(turn, family)):
            profiles = (CROWD, WHOLE, TIGHT) if family == "llama" else ((CROWD, WHOLE, TIGHT)[(turn + number) % 3],)
            if base == (2, 2):
                profiles = (*profiles, INNER)
            chosen += [
                pytest.param(
                    family,
                    base,
                    profile,
                    id=f"{family}-sp{base[0]}xtp{base[1]}-{profile.name}",
                    marks=[] if index == 0 and is_default(turn, family, base) else [pytest.mark.thorough],
                )
                for index, profile in enumerate(profiles)
            ]
    return chosen


def bases_of(turn: int, family: str) -> list[tuple[int, int]]:
    """Of a family's cases."""
    if family == "llama":
        return [base for world_size in (1, 2, 4) for base in bases(world_size)]
    return list(dict.fromkeys([*layouts(turn), *(DEFAULT_BASES if family in DEFAULT_FAMILIES else ())]))


def is_default(turn: int, family: str, base: tuple[int, int]) -> bool:
    """Whether the case runs without `--thorough`."""
    return base in DEFAULT_BASES if family in DEFAULT_FAMILIES else base == DEFAULT_BASES[turn % len(DEFAULT_BASES)]


@pytest.mark.parametrize(("family", "base", "profile"), cases())
def test_engine_equals_transformers(
    family: str, base: tuple[int, int], profile: Profile, rank_pool: Any, reference: Any
) -> None:
    expected = reference(family)
    pool = rank_pool(base[0] * base[1])
    outcomes = pool.run(run_case, expected.folder, base, profile, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=len([s for s in range(1, base[0] + 1) if base[0] % s == 0]))
