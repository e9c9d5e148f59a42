"""Models whose layers differ: in key/value heads, in head widths, and in whose keys and values they read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, check_case, layouts, parameters
from tests.equivalence.tiny_models import Reference, make_prompts, make_reference
from tests.equivalence.unequal import MODELS, make_unequal

pytestmark = pytest.mark.distributed

DEFAULT = {("gemma3n", (2, 2)), ("gemma4-small", (2, 1)), ("gemma4-large", (4, 1)), ("mimo_v2_flash", (1, 2))}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """`answers(name)`: a checkpoint of the model with transformers' answers, made once."""

    def make(name: str) -> Reference:
        folder = tmp_path_factory.mktemp(name)
        return make_reference(make_unequal(name, folder), folder, make_prompts())

    return cache(make)


def cases() -> list[Any]:
    """Every model on most bases of 1, 2 and 4 ranks, with alternating profiles; by default one base each."""
    chosen = []
    for turn, name in enumerate(MODELS):
        for number, base in enumerate(layouts(turn)):
            profiles = [(CROWD, WHOLE, TIGHT)[(turn + number) % 3], *([INNER] if base == (2, 2) else [])]
            for profile in profiles:
                is_default = (name, base) in DEFAULT and profile is profiles[0]
                chosen.append(parameters(name, base, profile, is_default))
    return chosen


@pytest.mark.parametrize(("name", "base", "profile"), cases())
def test_engine_equals_transformers(
    name: str, base: tuple[int, int], profile: Profile, rank_pool: Any, answers: Callable[[str], Reference]
) -> None:
    expected = answers(name)
    check_case(rank_pool, expected, base, profile)
