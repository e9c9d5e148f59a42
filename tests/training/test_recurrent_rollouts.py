"""Models with recurrent layers are served while DeepSpeed trains them, and from what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.cases import ModeShuffle, all_logprobs
from tests.tiny import settings
from tests.training.training import training
from ulysses_infer import SamplingParams, init_inference

pytestmark = pytest.mark.distributed
PROMPTS = [[5], [7, 8, 9, 10, 11], [3] * 17]
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=0, logprobs=0)
CASES = [
    pytest.param("qwen3_next", 3, (2, 1), id="gated delta nets, ZeRO 3"),
    *(
        pytest.param(kind, stage, base, id=f"{kind}, ZeRO {stage}, {base}", marks=pytest.mark.thorough)
        for kind, stage, base in (
            ("qwen3_next", 2, (1, 2)),
            ("nemotron_h", 3, (2, 1)),
            ("kimi_linear", 3, (1, 2)),
            ("lfm2", 2, (2, 1)),
            ("jamba", 3, (2, 1)),
            ("minimax", 3, (2, 1)),
        )
    ),
]


def worst_error(engine: Any, trained: Any) -> float:
    """Generate, then compare every token's log-probability with that of the training's own forward."""
    errors = []
    for output in engine.generate(PROMPTS, GREEDY):
        expected = trained.logprobs([*output.prompt_token_ids, *output.outputs[0].token_ids])
        errors += [abs(ours - theirs) for ours, theirs in zip(all_logprobs(output), expected, strict=True)]
    return max(errors)


def follow(kind: str, stage: int, base: tuple[int, int], folder: Path) -> list[float]:
    """On a rank: errors before training, after it but without new weights, with them, and from the checkpoint."""
    with (
        training(stage, 1, config=next(tiny_configs(kind))) as trained,
        init_inference(trained.engine, **settings(*base, **{"model.max_model_len": 128})) as engine,
    ):
        if engine.is_first:
            engine._engine.choose_mode = ModeShuffle(engine.config.parallel.available_modes)
        errors = [worst_error(engine, trained)]
        trained.step()
        errors.append(worst_error(engine, trained))
        engine.update_weights(trained.engine)
        errors.append(worst_error(engine, trained))
        trained.step()
        trained.engine.save_checkpoint(str(folder), tag="saved")
        engine.update_weights(str(folder))
        errors.append(worst_error(engine, trained))
    return errors


@pytest.mark.parametrize(("kind", "stage", "base"), CASES)
def test_what_is_served_is_what_was_trained(
    kind: str, stage: int, base: tuple[int, int], training_ranks: Any, tmp_path: Path
) -> None:
    for before, stale, updated, saved in training_ranks(2).run(follow, kind, stage, base, tmp_path):
        assert max(before, updated, saved) < 1e-4
        assert stale > 0.01, "weights change only when they are told to"
