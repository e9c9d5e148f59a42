"""Models whose layers differ: in key/value heads, in head widths, and in whose keys and values they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, check, layouts, run_case
from tests.equivalence.tiny_models import NEW_TOKENS, Reference, make_prompts, make_reference
from tests.equivalence.unequal import MODELS, make_unequal

pytestmark = pytest.mark.distributed

DEFAULT = {("gemma3n", (2, 2)), ("gemma4-small", (2, 1)), ("gemma4-large", (4, 1)), ("mimo_v2_flash", (1, 2))}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """`answers(name)`: a checkpoint of the model with transformers' answers, made once."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = make_reference(make_unequal(name, folder), folder, make_prompts())
        return made[name]

    return get


def cases() -> list[Any]:
    """Every model on most bases of 1, 2 and 4 ranks, with alternating profiles; by default one base each."""
    chosen = []
    for turn, name in enumerate(MODELS):
        for number, base in enumerate(layouts(turn)):
            profiles = [(CROWD, WHOLE, TIGHT)[(turn + number) % 3], *([INNER] if base == (2, 2) else [])]
            for profile in profiles:
                is_default = (name, base) in DEFAULT and profile is profiles[0]
                marks = [] if is_default else [pytest.mark.thorough]
                chosen.append(pytest.param(name, base, profile, marks=marks, id=_id(name, base, profile)))
    return chosen


def _id(name: str, base: tuple[int, int], profile: Profile) -> str:
    return f"{name}-sp{base[0]}xtp{base[1]}-{profile.name}"


@pytest.mark.parametrize(("name", "base", "profile"), cases())
def test_engine_equals_transformers(
    name: str, base: tuple[int, int], profile: Profile, rank_pool: Any, answers: Callable[[str], Reference]
) -> None:
    expected = answers(name)
    outcomes = rank_pool(base[0] * base[1]).run(run_case, expected.folder, base, profile, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))
