"""Sparse attention over pools of tokens, in hybrids: transformers' tokens and log-probabilities in every mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.generate.tiny_configs import parts_of, shallow
from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, check, layouts, run_case, with_snapshots
from tests.equivalence.families import LATENT, ROUTED, SHAPE
from tests.equivalence.tiny_models import Reference, make_checkpoint, make_prompts, make_reference
from ulysses_infer.errors import ConfigError, UnsupportedModelError
from ulysses_infer.model.injection.inject import Injection
from ulysses_infer.model.model import build_empty_model
from ulysses_infer.parallel.layout import Layout, Mode

pytestmark = pytest.mark.distributed

LENGTHS = (2, 13, 21, 38)
NEW_TOKENS = 9
END = 50
HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "indexed_attention"] * 2}
GLM = {
    **SHAPE,
    **LATENT,
    **ROUTED,
    "n_routed_experts": 4,
    "qk_rope_head_dim": 0,
    "linear_num_heads": 8,
    "linear_head_dim": 8,
    "index_n_heads": 16,  # with few heads, many keys have no score but 0, of which transformers selects any
    "index_head_dim": 8,
    "index_topk": 12,
    "index_kpool": 4,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
}
QWEN = {
    **SHAPE,
    **ROUTED,
    **HYBRID,
    "eos_token_id": END,
    "num_experts": 4,
    "shared_expert_intermediate_size": 32,
    "head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    | {"partial_rotary_factor": 0.5},
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 12,
    "indexer_budget": 9,
    "indexer_compress_ratio": 3,
    "hc_count": 2,
    "hc_lowrank": 12,
    "ple_layer_ids": [1, 3],
    "ple_embed_dim": 64,
    "heads_per_ngram": 4,
    "ngram_vocab_size_base": 40,
    "make_ngram_vocab_size_divisible_by": 4,
    "split_ngram_parts": 4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm5_next": ("glm5_next", {**GLM, **HYBRID, "mlp_layer_types": ["dense", "sparse"] * 2}),
    "glm5_next-shared": (
        "glm5_next",
        {
            **GLM,
            "num_hidden_layers": 5,
            "layer_types": ["linear_attention", *["indexed_attention"] * 2, "linear_attention", "indexed_attention"],
            "indexer_types": ["full", "full", "shared", "full", "full"],
            "mlp_layer_types": ["sparse"] * 5,
            "index_kpool": 3,
            "linear_lower_bound": None,
        },
    ),
    "qwen4_exp": ("qwen4_exp", QWEN),
    "qwen4_exp_text": ("qwen4_exp_text", {**QWEN, "ngram_size": 4, "heads_per_ngram": 8, "ple_embed_dim": 48}),
}
BY_DEFAULT = (("glm5_next-shared", (2, 1)), ("qwen4_exp_text", (2, 1)))


def cases() -> list[Any]:
    """Every model on most bases with alternating profiles; two cases by default."""
    chosen = []
    for number, model in enumerate(MODELS):
        for turn, base in enumerate(layouts(number), start=number):
            profile = (TIGHT, CROWD, INNER if base == (2, 2) else CROWD, WHOLE)[turn % 4]
            marks = [] if (model, base) in BY_DEFAULT else [pytest.mark.thorough]
            name = f"{model}-sp{base[0]}xtp{base[1]}-{profile.name}"
            chosen.append(pytest.param(model, base, profile, id=name, marks=marks))
    return chosen


def config_of(name: str, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING

    family, values = MODELS[name]
    whole: Any = CONFIG_MAPPING[family]()
    if not parts_of(whole):
        return type(whole)(**{**values, **changes})
    encoders = {part: shallow(config) for part, config in parts_of(whole).items() if part != "text_config"}
    return type(whole)(text_config=type(whole.text_config)(**{**values, **changes}), **encoders)


def prompts_with_ends(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Random prompts, some with a token that ends a text within."""
    prompts = make_prompts(lengths=lengths)
    for prompt in prompts[1:]:
        prompt[len(prompt) // 2] = prompt[-2] = END
    return prompts


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`reference(name)`: a tiny checkpoint of one of `MODELS` with transformers' answers, made once."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = make_reference(
                make_checkpoint(config_of(name), folder), folder, prompts_with_ends(), NEW_TOKENS
            )
        return made[name]

    return get


@pytest.mark.parametrize(("model", "base", "profile"), cases())
def test_selected_pools_give_what_transformers_gives(
    model: str, base: tuple[int, int], profile: Profile, rank_pool: Any, reference: Any
) -> None:
    expected = reference(model)
    folder: Path = expected.folder
    profile = with_snapshots(profile, folder)
    outcomes = rank_pool(base[0] * base[1]).run(run_case, folder, base, profile, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))


REAL: dict[str, dict[str, Any]] = {
    "glm5_next": {
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "linear_num_heads": 64,
        "n_routed_experts": 288,
        "num_experts_per_tok": 8,
        "index_n_heads": 32,
        "index_kpool": 16,
        "hc_mult": 4,
    },
    "qwen4_exp": {
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "hc_count": 4,
        "heads_per_ngram": 8,
        "ngram_size": 3,
    },
}
SMALL: dict[str, dict[str, Any]] = {"glm5_next": {"index_topk": 16}, "qwen4_exp": {}}


@pytest.mark.thorough
@pytest.mark.parametrize("name", list(REAL))
@pytest.mark.parametrize("base", [(8, 1), (2, 4)])
def test_real_numbers_of_heads_and_experts_on_eight_ranks(
    name: str, base: tuple[int, int], rank_pool: Any, tmp_path: Path
) -> None:
    """Those of transformers' default config; widths and layers are small enough for a test."""
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[MODELS[name][0]]().get_text_config(decoder=True)
    assert {key: getattr(default, key) for key in REAL[name]} == REAL[name]
    config = config_of(name, **REAL[name], **SMALL[name])
    model = make_checkpoint(config, tmp_path)
    expected = make_reference(model, tmp_path, prompts_with_ends((1, 9, 37)), 4)
    profile = replace(CROWD, settings={"parallel.expert_placement": "expert"})
    profile = with_snapshots(profile, tmp_path)
    outcomes = rank_pool(8).run(run_case, tmp_path, base, profile, expected.prompts, 4)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))


def test_ngram_heads_that_cannot_be_cut_name_the_layouts_that_can() -> None:
    with pytest.raises(ConfigError) as failure:
        Injection(build_empty_model(config_of("qwen4_exp_text"), torch.float32), Layout(Mode(3, 1)), shard=0)
    assert "do not divide over sp * tp = 3 ranks" in str(failure.value)
    sizes = {"ngram_size": 3, "heads_per_ngram": 4, "ple_embed_dim": 40}
    wide = config_of("qwen4_exp_text", linear_num_key_heads=16, linear_num_value_heads=16, **sizes)
    with pytest.raises(
        ConfigError, match=r"8 n-gram heads and 128 channels of .*PLELayer .* use sp \* tp = 1, 2, 4, 8$"
    ):
        Injection(build_empty_model(wide, torch.float32), Layout(Mode(16, 1)), shard=0)


def test_an_index_that_leaves_out_the_last_tokens_is_refused() -> None:
    model = build_empty_model(config_of("glm5_next", index_kpool_always_select_tail=False), torch.float32)
    with pytest.raises(UnsupportedModelError, match="the first tokens of a text attend to nothing"):
        Injection(model, Layout(Mode(1, 1)), shard=0)
