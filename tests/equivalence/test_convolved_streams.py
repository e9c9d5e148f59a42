"""Models with convolutions in attention or in the residual stream give transformers' results in every mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, check, layouts, run_case, with_snapshots
from tests.equivalence.tiny_models import NEW_TOKENS, make_checkpoint, make_prompts, make_reference

pytestmark = pytest.mark.distributed

KINDS = (
    "inkling2_text",  # convolutions that depend on the token, a sink per token
    "inkling_text",  # logits of relative positions
    "zaya",  # convolved queries and keys, delayed values
    "rwkv",  # each token mixed with the one before it
    "xlstm",
)
EAGER = replace(CROWD, name="eager", settings={"runtime.enforce_eager": True})
NO_PREFIXES = replace(TIGHT, prefix_caching=False)
TORCH = replace(WHOLE, settings={"runtime.attention_backend": "torch"})
PROFILES = (CROWD, TIGHT, WHOLE, INNER, NO_PREFIXES, TORCH, EAGER)
DEFAULT = (("inkling2_text", (2, 1), CROWD),)


def cases() -> list[Any]:
    """Every kind on most bases of 1, 2 and 4 ranks with alternating profiles; one by default."""
    listed = [
        (kind, base, PROFILES[(turn + number) % len(PROFILES)])
        for turn, kind in enumerate(KINDS)
        for number, base in enumerate(layouts(turn))
    ]
    listed += [(kind, (2, 1), TIGHT) for kind in KINDS]
    rest = [pytest.param(*case, id=_name(*case), marks=pytest.mark.thorough) for case in listed if case not in DEFAULT]
    return [*(pytest.param(*case, id=_name(*case)) for case in DEFAULT), *rest]


def _name(kind: str, base: tuple[int, int], profile: Profile) -> str:
    return f"{kind}-sp{base[0]}xtp{base[1]}-{profile.name}-{PROFILES.index(profile)}"


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`references(kind)`: a tiny checkpoint with transformers' answers, made once."""
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = make_reference(make_checkpoint(next(tiny_configs(kind)), folder), folder, make_prompts())
        return made[kind]

    return get


def run(expected: Any, base: tuple[int, int], profile: Profile, rank_pool: Any) -> None:
    """Run the case on the ranks of `base` and compare."""
    profile = with_snapshots(profile, expected.folder)
    outcomes = rank_pool(base[0] * base[1]).run(run_case, expected.folder, base, profile, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=len([s for s in range(1, base[0] + 1) if base[0] % s == 0]))


@pytest.mark.parametrize(("kind", "base", "profile"), cases())
def test_engine_equals_transformers(
    kind: str, base: tuple[int, int], profile: Profile, rank_pool: Any, references: Any
) -> None:
    run(references(kind), base, profile, rank_pool)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["inkling_text", "inkling2_text"])
def test_rows_of_the_head_that_are_no_tokens(kind: str, tmp_path: Path, rank_pool: Any) -> None:
    config = next(tiny_configs(kind))
    config.unpadded_vocab_size = 89
    model = make_checkpoint(config, tmp_path)
    run(make_reference(model, tmp_path, make_prompts(89)), (2, 1), CROWD, rank_pool)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["inkling_text", "inkling2_text"])
def test_heads_that_do_not_divide(kind: str, tmp_path: Path, rank_pool: Any) -> None:
    """6 query heads and 3 KV heads on 4 ranks."""
    config = next(tiny_configs(kind))
    config.num_attention_heads, config.num_key_value_heads = 6, 3
    run(make_reference(make_checkpoint(config, tmp_path), tmp_path, make_prompts()), (2, 2), CROWD, rank_pool)
