"""Engines whose recurrent layers run in C give transformers' tokens in every mode, from recorded decodes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.cases import CROWD, check, run_case, with_snapshots
from tests.equivalence.tiny_models import NEW_TOKENS, make_checkpoint, make_prompts, make_reference
from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.model.recurrent.layer import RecurrentLayer
from ulysses_infer.native.library import is_available

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not is_available("state_space"), reason="needs a C compiler"),
]
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
LAYERS = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
SHAPES: dict[str, dict[str, Any]] = {
    "bamba": {
        "mamba_d_state": 32,
        "mamba_n_groups": 1,
        "num_hidden_layers": 4,
        "attn_layer_indices": [2],
    },  # ranks share its norm
    "nemotron_h": {"ssm_state_size": 32, "mamba_head_dim": 16},
    "kimi_linear": {
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        "num_hidden_layers": 4,
        "layer_types": LAYERS,
        "mlp_layer_types": ["dense"] * 4,
    },
    "minimax": {},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]},
}


def checkpoint(kind: str, folder: Path) -> Any:
    """A tiny model with widths that the kernels take, and transformers' answers."""
    config = next(tiny_configs(kind))
    for name, value in SHAPES[kind].items():
        setattr(config, name, value)
    return make_reference(make_checkpoint(config, folder), folder, make_prompts())


@pytest.mark.parametrize(
    "kind", ["bamba", *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("lfm2", "kimi_linear"))]
)
def test_decodes_are_recorded(kind: str, tmp_path: Path) -> None:
    expected = checkpoint(kind, tmp_path)
    changes = {"cache.latent": False, "model.max_model_len": 128}  # the C kernels of attention take no latents
    with init_inference(str(tmp_path), **settings(**changes)) as engine:
        outputs = engine.generate(expected.prompts, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected.tokens
        worker = engine._rank.worker
        layers = [each for each in worker.model.injection.recurrent_layers if isinstance(each, RecurrentLayer)]
        assert layers
        assert all(layer.native is not None for layer in layers)
        assert worker.graphs._recorded


CASES = [
    pytest.param(
        kind, base, id=f"{kind} {base}", marks=() if (kind, base) == ("bamba", (2, 1)) else pytest.mark.thorough
    )
    for kind, base in (
        ("bamba", (2, 1)),
        ("bamba", (2, 2)),
        ("nemotron_h", (1, 2)),
        ("kimi_linear", (2, 2)),
        ("lfm2", (4, 1)),
        ("minimax", (2, 1)),
    )
]


@pytest.mark.parametrize(("kind", "base"), CASES)
def test_every_mode_gives_transformers_tokens(kind: str, base: tuple[int, int], rank_pool: Any, tmp_path: Path) -> None:
    expected = checkpoint(kind, tmp_path)
    profile = with_snapshots(CROWD, tmp_path)
    outcomes = rank_pool(base[0] * base[1]).run(run_case, tmp_path, base, profile, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=len([s for s in range(1, base[0] + 1) if base[0] % s == 0]))
