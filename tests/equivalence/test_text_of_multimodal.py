"""Whole checkpoints with multimodal encoders, given text alone, compared with transformers' whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.cases import CROWD, INNER, Profile, check, run_case
from tests.equivalence.tiny_models import NEW_TOKENS, make_checkpoint, make_prompts, make_reference

pytestmark = pytest.mark.distributed
LENGTHS = (1, 3, 9, 17, 26)  # shared prefixes are cached for the second run of a case


@pytest.mark.parametrize(
    ("model_type", "base", "profile"),
    [
        ("gemma3", (4, 1), CROWD),
        ("qwen3_vl", (2, 2), INNER),  # positions for time, height and width: one for all three
        pytest.param("mistral3", (2, 2), CROWD, marks=pytest.mark.thorough),
        pytest.param("llama4", (2, 2), CROWD, marks=pytest.mark.thorough),
        pytest.param("qwen3_vl_moe", (4, 1), CROWD, marks=pytest.mark.thorough),  # experts saved transposed
        pytest.param("qwen2_5_vl", (4, 2), CROWD, marks=pytest.mark.thorough),
    ],
    ids=lambda value: getattr(value, "name", str(value).replace(" ", "")),
)
def test_text_alone_gives_the_outputs_of_the_whole_model(
    model_type: str, base: tuple[int, int], profile: Profile, rank_pool: Any, tmp_path: Path
) -> None:
    model = make_checkpoint(next(tiny_configs(model_type)), tmp_path)
    expected = make_reference(model, tmp_path, make_prompts(lengths=LENGTHS), NEW_TOKENS)
    outcomes = rank_pool(base[0] * base[1]).run(run_case, tmp_path, base, profile, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))
