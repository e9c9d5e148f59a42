"""Learned sparse attention (DSA): transformers' tokens and log-probabilities, with few of many keys selected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.generate.tiny_configs import parts_of, shallow
from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, bases, check, run_case
from tests.equivalence.families import LATENT, ROUTED, SHAPE
from tests.equivalence.tiny_models import NEW_TOKENS, Reference, make_checkpoint, make_prompts, make_reference

pytestmark = pytest.mark.distributed

TOP_K = 8
LENGTHS = (1, 2, 7, 13, 21, 38, 45)
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 0.5,
    "beta_fast": 32,
    "beta_slow": 1,
    "rope_theta": 10000.0,
}
INDEX = {**SHAPE, **LATENT, **ROUTED, "index_topk": TOP_K, "index_n_heads": 16, "index_head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
SHARED = {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "full", "shared"]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v32": ("deepseek_v32", {**EXPERTS, "rope_parameters": YARN}),
    "glm_moe_dsa": ("glm_moe_dsa", {**EXPERTS, **SHARED}),
    "axk2": ("axk2", {**EXPERTS, "gated_norm_rank": 8}),
    "hy_v4": ("hy_v4", {**EXPERTS, **SHARED}),
    "dots3_note_text": (
        "dots3_note_text",
        {
            **EXPERTS,
            "num_hidden_layers": 4,
            "layer_types": ["indexed_attention", "sliding_attention", "sliding_attention", "indexed_attention"],
            "sliding_window": 6,
            "shared_experts_intermediate_size": 24,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 12,
            "swa_kv_lora_rank": 24,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 12,
            "swa_v_head_dim": 8,
        },
    ),
    "mistral_large4": (
        "mistral_large4",
        {
            **EXPERTS,
            "num_hidden_layers": 6,
            "indexer_types": ["full", "shared", "full", "shared", "full", "shared"],
            "no_rope_layers": [1, 1, 0, 1, 1, 0],
            "kv_source_layers": [0, 1, 2, 1, 1, 2],
            "num_key_value_heads": 8,
        },
    ),
}
BY_DEFAULT = ("glm_moe_dsa", (2, 1))


def cases() -> list[Any]:
    """Every model on every base; what is cached and other options alternate. One case by default."""
    chosen = []
    for number, model in enumerate(MODELS):
        for turn, base in enumerate([base for world_size in (1, 2, 4) for base in bases(world_size)], start=number):
            profile = (CROWD, TIGHT, INNER if base == (2, 2) else CROWD, WHOLE, TIGHT)[turn % 5]
            latent = (turn + number // 2) % 2 == 0
            name = f"{model}-{'latent' if latent else 'heads'}-sp{base[0]}xtp{base[1]}-{profile.name}"
            marks = [] if (model, base) == BY_DEFAULT else [pytest.mark.thorough]
            chosen.append(pytest.param(model, base, latent, profile, id=name, marks=marks))
    return chosen


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny checkpoint of one of `MODELS` with transformers' answers."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            prompts = make_prompts(lengths=LENGTHS)
            made[name] = make_reference(make_indexed_checkpoint(name, folder), folder, prompts)
        return made[name]

    return get


def config_of(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    family, changes = MODELS[name]
    whole = CONFIG_MAPPING[family]()
    if not parts_of(whole):
        return type(whole)(**{**INDEX, **changes})
    encoders = {part: shallow(config) for part, config in parts_of(whole).items() if part != "text_config"}
    return type(whole)(text_config=type(whole.text_config)(**{**INDEX, **changes}), **encoders)


def make_indexed_checkpoint(name: str, folder: Path) -> Any:
    """As `make_checkpoint`, with random values also for learned rotary frequencies (mistral_large4)."""
    model = make_checkpoint(config_of(name), folder)
    learned = [buffer for key, buffer in model.named_buffers() if key.endswith("rotary_emb.alpha")]
    for buffer in learned:
        buffer.copy_(0.2 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(0)))
    if learned:
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("model", "base", "latent", "profile"), cases())
def test_selected_keys_give_what_transformers_gives(
    model: str, base: tuple[int, int], latent: bool, profile: Profile, rank_pool: Any, reference: Any
) -> None:
    expected = reference(model)
    folder: Path = expected.folder
    wanted = replace(profile, settings={"cache.latent": latent})
    outcomes = rank_pool(base[0] * base[1]).run(run_case, folder, base, wanted, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))
