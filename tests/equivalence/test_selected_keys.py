"""Learned sparse attention (DSA): transformers' tokens and log-probabilities, with few of many keys selected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.generate.tiny_configs import parts_of, shallow
from tests.distributed.test_kv_invariance import TOLERANCE, SlotRecorder
from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, check, layouts, run_case
from tests.equivalence.families import LATENT, ROUTED, SHAPE
from tests.equivalence.tiny_models import (
    NEW_TOKENS,
    VOCABULARY,
    Reference,
    make_checkpoint,
    make_prompts,
    make_reference,
)
from tests.tiny import settings
from tools.memory_table import read_config

pytestmark = pytest.mark.distributed

MODEL_CONFIGS = Path(__file__).parents[2] / "configs" / "models"
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
    """Every model on most bases; what is cached and other options alternate. One case by default."""
    chosen = []
    for number, model in enumerate(MODELS):
        for turn, base in enumerate(layouts(number), start=number):
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
    whole: Any = CONFIG_MAPPING[family]()
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


def compare_modes(folder: str, sp: int, tp: int, prompts: list[list[int]]) -> tuple[float, torch.Tensor]:
    """On a rank: the largest difference between modes, and the index keys that it caches of all tokens and layers."""
    from ulysses_infer import SamplingParams, init_inference

    changes = {"cache.enable_prefix_caching": False, "scheduler.max_num_batched_tokens": 16}
    runs: list[torch.Tensor] = []
    with init_inference(folder, **settings(sp, tp, **changes)) as engine:
        inner: Any = engine
        recorder = SlotRecorder(inner._rank.worker.tables)
        for mode in engine.config.parallel.available_modes:
            if inner.is_first:
                inner._engine.choose_mode = lambda _, mode=mode: mode
            engine.generate(prompts, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
            _, slots = recorder.take()
            keys = inner._rank.worker.cache.index_keys
            runs.append(torch.stack([keys[layer].flatten(0, 2)[slots] for layer in sorted(keys)]))
    return max(float((run - runs[0]).abs().max()) for run in runs), runs[0]


@pytest.mark.thorough
@pytest.mark.parametrize(("sp", "tp"), [(2, 1), (2, 2)])
def test_every_mode_and_every_rank_caches_the_same_index_keys(sp: int, tp: int, rank_pool: Any, reference: Any) -> None:
    folder = str(reference("glm_moe_dsa").folder)
    results = rank_pool(sp * tp).run(compare_modes, folder, sp, tp, make_prompts(VOCABULARY, (1, 7, 21, 38)))
    first = results[0][1]
    assert first.shape[0] == 2, "two of four layers have an index"
    assert float(first.abs().mean()) > 0.1
    for difference, keys in results:
        assert difference <= TOLERANCE * float(first.abs().max())
        assert (keys - first).abs().max() <= TOLERANCE * first.abs().max()


REAL = {
    "num_attention_heads": 128,
    "n_routed_experts": 256,
    "n_group": 8,
    "index_n_heads": 64,
    "num_experts_per_tok": 8,
}
WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")


@pytest.mark.thorough
@pytest.mark.parametrize("base", [(8, 1), (2, 4)])
def test_deepseek_v32_with_its_heads_and_experts_on_eight_ranks(
    base: tuple[int, int], rank_pool: Any, tmp_path: Path
) -> None:
    """Heads, groups, experts and index heads are the real ones; widths and layers are small enough for a test."""
    real = read_config(MODEL_CONFIGS / "deepseek-v3.2.json")
    assert {key: getattr(real, key) for key in REAL} == REAL
    values = {key: value for key, value in real.to_dict().items() if key not in ("quantization_config", "dtype")}
    small = {key: SHAPE[key] for key in (*WIDTHS, "bos_token_id", "eos_token_id")}
    widths = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    widths |= {"moe_intermediate_size": 16, "index_head_dim": 16, "index_topk": TOP_K}
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "mlp_layer_types": None, "layer_types": None}
    config = type(real)(**{**values, **small, **widths, **layers})
    model = make_checkpoint(config, tmp_path)
    expected = make_reference(model, tmp_path, make_prompts(lengths=(1, 9, 31)), 4)
    profile = replace(CROWD, settings={"cache.latent": True, "parallel.expert_placement": "expert"})
    outcomes = rank_pool(8).run(run_case, tmp_path, base, profile, expected.prompts, 4)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))
