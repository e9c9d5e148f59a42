"""Families whose attention goes through an adapter, in the variants that their configs allow."""

from __future__ import annotations

from typing import Any

import pytest

from tests.equivalence.cases import CROWD, TIGHT, WHOLE, Profile, check, run_case
from tests.equivalence.tiny_models import NEW_TOKENS, VOCABULARY, make_checkpoint, make_prompts, make_reference

pytestmark = pytest.mark.distributed
Base = tuple[int, int]

TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, **TOKENS}
GPT_SIZES = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 128, **TOKENS}
OLD_FALCON = {**SIZES, "new_decoder_architecture": False, "bias": True, "multi_query": True, "alibi": True}
NEW_FALCON = {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 4, "alibi": False}
MPT = {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 8, "max_seq_len": 128, **TOKENS}
NEO = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 8,
    "max_position_embeddings": 128,
    "attention_types": [[["local", "global"], 1]],
    "window_size": 6,
    **TOKENS,
}
JETMOE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "kv_channels": 16,
    "intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    **TOKENS,
}
CODEGEN = {**GPT_SIZES, "rotary_dim": 4, "n_ctx": 128}


def case(model_type: str, values: dict[str, Any], base: Base, profile: Profile = CROWD, name: str = "") -> Any:
    """A case that runs with `--thorough` only."""
    shown = f"{model_type}{f' {name}' if name else ''}-sp{base[0]}xtp{base[1]}-{profile.name}"
    return pytest.param(model_type, values, base, profile, id=shown, marks=pytest.mark.thorough)


@pytest.mark.parametrize(
    ("model_type", "values", "base", "profile"),
    [
        pytest.param("bloom", SIZES, (2, 2), CROWD, id="bloom"),
        pytest.param("falcon", OLD_FALCON, (4, 1), TIGHT, id="falcon, ALiBi, one KV head"),
        pytest.param("codegen", CODEGEN, (1, 2), WHOLE, id="codegen"),
        case("bloom", {**SIZES, "hidden_size": 96, "num_attention_heads": 12}, (2, 2), name="12 heads"),
        case("bloom", {**SIZES, "hidden_size": 72, "num_attention_heads": 6}, (2, 2), name="6 heads, padded"),
        case("bloom", {**SIZES, "apply_residual_connection_post_layernorm": True}, (2, 4), TIGHT),
        case("falcon", {**OLD_FALCON, "multi_query": False, "parallel_attn": False}, (2, 2), name="old"),
        case("falcon", {**OLD_FALCON, "alibi": False}, (1, 4), WHOLE, name="old, rotary"),
        case("falcon", {**OLD_FALCON, "alibi": False, "hidden_size": 71 * 4, "num_attention_heads": 71}, (8, 1)),
        case("falcon", {**NEW_FALCON, "alibi": True}, (2, 2), name="new, ALiBi"),
        case("falcon", NEW_FALCON, (2, 4), name="new, more ranks than KV heads"),
        case("falcon", {**NEW_FALCON, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}, (4, 2), TIGHT, name="new"),
        case("mpt", MPT, (4, 1), TIGHT),
        case("mpt", {**MPT, "d_model": 96, "n_heads": 12}, (2, 2), WHOLE, name="12 heads"),
        case("mpt", {**MPT, "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3}}, (1, 2), name="clipped"),
        case("gptj", {**GPT_SIZES, "rotary_dim": 4}, (2, 2)),
        case("codegen", CODEGEN, (4, 2), TIGHT),
        case("gpt_neo", NEO, (2, 2), TIGHT),
        case("gpt_bigcode", {**GPT_SIZES, "multi_query": False}, (2, 2)),
        case("openai-gpt", GPT_SIZES, (4, 1)),
        case("diffllama", {**SIZES, "num_key_value_heads": 4, "intermediate_size": 96}, (2, 1), TIGHT),
        case("jetmoe", JETMOE, (2, 4), name="more ranks than KV heads"),
    ],
)
def test_engine_equals_transformers(
    model_type: str, values: dict[str, Any], base: Base, profile: Profile, rank_pool: Any, tmp_path: Any
) -> None:
    from transformers import CONFIG_MAPPING

    model = make_checkpoint(CONFIG_MAPPING[model_type](**values), tmp_path)
    expected = make_reference(model, tmp_path, make_prompts())
    outcomes = rank_pool(base[0] * base[1]).run(run_case, tmp_path, base, profile, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))
