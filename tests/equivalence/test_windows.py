"""Prompts many times longer than the attention span: other requests reuse their blocks, and no output changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.equivalence.cases import CROWD, MAX_MODEL_LEN, TIGHT, Profile, check, run_case
from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import NEW_TOKENS, make_checkpoint, make_prompts, make_reference

pytestmark = pytest.mark.distributed

LENGTHS = (5, 2, 1, 3, 70, 33, 93, 52)
CACHED = replace(CROWD, num_blocks=100, max_num_seqs=8)
UNCACHED = replace(CACHED, name="uncached", prefix_caching=False)
PRESSED = replace(TIGHT, num_blocks=28)
"""Blocks of layers that see everything; the others have as many as they need."""
PRESSED_WINDOWS = replace(TIGHT, num_blocks=8, settings={"model.max_model_len": MAX_MODEL_LEN})
"""If all layers have windows of 6: a chunk of 16 takes 7, and short texts grow to 3 each."""
FAMILIES = {
    "gemma2": PRESSED,
    "gemma3_text": PRESSED,
    "mistral": PRESSED_WINDOWS,
    "gpt_oss": PRESSED,
    "llama4_text": PRESSED,
}


def cases() -> list[Any]:
    """Every family with every profile; by default each with one."""
    chosen = []
    for turn, (family, pressed) in enumerate(FAMILIES.items()):
        for number, profile in enumerate((CACHED, pressed, UNCACHED)):
            marks = [] if number == turn % 3 else [pytest.mark.thorough]
            chosen.append(pytest.param(family, profile, marks=marks, id=f"{family}-{profile.name}"))
    return chosen


@pytest.mark.parametrize(("family", "profile"), cases())
def test_out_of_window_blocks_are_freed_and_tokens_do_not_change(
    family: str, profile: Profile, tmp_path: Path, rank_pool: Any
) -> None:
    prompts = make_prompts(lengths=LENGTHS)
    reference = make_reference(make_checkpoint(tiny_config(family), tmp_path), tmp_path, prompts)
    outcomes = rank_pool(2).run(run_case, tmp_path, (2, 1), profile, prompts, NEW_TOKENS)
    check(outcomes, reference, profile, num_modes=2)
    assert outcomes[0].all_windows == (family == "mistral")
    assert (outcomes[0].num_preempted > 0) == (profile.name == TIGHT.name)
