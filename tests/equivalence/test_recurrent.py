"""Models with recurrent layers give transformers' tokens and log-probabilities in every mode, however they are run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, check, layouts, run_case, with_snapshots
from tests.equivalence.tiny_models import NEW_TOKENS, make_checkpoint, make_prompts, make_reference
from ulysses_infer.errors import ConfigError
from ulysses_infer.model.injection.inject import Injection
from ulysses_infer.model.model import build_empty_model
from ulysses_infer.parallel.layout import Layout, Mode

pytestmark = pytest.mark.distributed

KINDS = (
    "qwen3_next",  # gated delta net, its projections interleaved
    "mamba2",  # no attention at all
    "qwen3_5_text",  # gated delta net
    "olmo_hybrid",
    "kimi_linear",  # a decay per channel, and latent attention
    "bailing_hybrid",
    "minimax",  # lightning attention
    "lfm2",  # short convolutions
    "lfm3",
    "mamba",
    "falcon_mamba",
    "jamba",
    "bamba",
    "granitemoehybrid",
    "falcon_h1",  # attention and Mamba side by side
    "nemotron_h",  # limited time steps
    "recurrent_gemma",  # a gated linear recurrence per channel
    "zamba",  # Mamba in heads
    "zamba2",  # blocks of attention that layers share
)
EAGER = replace(CROWD, name="eager", settings={"runtime.enforce_eager": True})
NO_PREFIXES = replace(TIGHT, prefix_caching=False)
DEFAULT = (("qwen3_next", (2, 2), CROWD), ("mamba2", (2, 1), TIGHT))


def cases() -> list[Any]:
    """Every kind on most bases of 1, 2 and 4 ranks with alternating profiles; the first two once by default."""
    chosen = [pytest.param(*case, id=_name(*case)) for case in DEFAULT]
    for turn, kind in enumerate(KINDS):
        for number, base in enumerate(layouts(turn)):
            profile = (CROWD, WHOLE, TIGHT, EAGER, INNER, NO_PREFIXES)[(turn + number) % 6]
            if (kind, base, profile) not in DEFAULT:
                name = _name(kind, base, profile)
                chosen.append(pytest.param(kind, base, profile, id=name, marks=pytest.mark.thorough))
    return chosen


def _name(kind: str, base: tuple[int, int], profile: Profile) -> str:
    prefixes = "" if profile is not NO_PREFIXES else ", no prefixes"
    return f"{kind}-sp{base[0]}xtp{base[1]}-{profile.name}{prefixes}"


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`recurrent(kind)`: a tiny checkpoint with transformers' answers, made once."""
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = make_checkpoint(next(tiny_configs(kind)), folder)
            made[kind] = make_reference(model, folder, make_prompts())
        return made[kind]

    return get


@pytest.mark.parametrize(("kind", "base", "profile"), cases())
def test_engine_equals_transformers(
    kind: str, base: tuple[int, int], profile: Profile, rank_pool: Any, recurrent: Any
) -> None:
    expected = recurrent(kind)
    profile = with_snapshots(profile, expected.folder)
    outcomes = rank_pool(base[0] * base[1]).run(run_case, expected.folder, base, profile, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=len([s for s in range(1, base[0] + 1) if base[0] % s == 0]))


REAL = {
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "num_experts": 512,
    "num_experts_per_tok": 10,
}
"""Of Qwen3-Next-80B-A3B."""


@pytest.mark.thorough
@pytest.mark.parametrize("base", [(8, 1), (2, 4)])
def test_long_prompts_of_qwen3_next_with_its_real_heads_and_experts_on_eight_ranks(
    base: tuple[int, int], rank_pool: Any, tmp_path: Path
) -> None:
    """Widths and layers are small enough for a test; 2,000 tokens take 63 chunks or more."""
    from transformers import Qwen3NextConfig

    default = Qwen3NextConfig()
    assert {key: getattr(default, key) for key in REAL} == REAL
    small = next(tiny_configs("qwen3_next")).to_dict() | REAL | {"max_position_embeddings": 4096}
    model = make_checkpoint(Qwen3NextConfig.from_dict(small), tmp_path)
    expected = make_reference(model, tmp_path, make_prompts(lengths=(2000, 9)), 4)
    changes = {"model.max_model_len": 2048, "parallel.expert_placement": "expert"}
    long = replace(CROWD, num_blocks=600, max_num_batched_tokens=32, settings=changes)
    profile = with_snapshots(long, tmp_path)
    outcomes = rank_pool(8).run(run_case, tmp_path, base, profile, expected.prompts, 4)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))


def test_heads_that_cannot_be_cut_name_the_layouts_that_can() -> None:
    model = build_empty_model(next(tiny_configs("qwen3_next")), torch.float32)
    with pytest.raises(ConfigError) as failure:
        Injection(model, Layout(Mode(3, 1)), shard=0)
    assert str(failure.value) == (
        "2 key heads and 8 value heads of Qwen3NextGatedDeltaNet do not divide over sp * tp = 3 ranks; "
        "use sp * tp = 1, 2, 4, 8"
    )
