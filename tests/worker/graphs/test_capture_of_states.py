"""Decode steps of hybrids can be captured: no host reads, slots in fixed memory, a slot for padding."""

import pytest
from transformers import Qwen3NextConfig

from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.test_pooled_keys import config_of
from tests.worker.graphs.capturing import capture, make_rank, run_step
from ulysses_infer.kernels.launch import assume
from ulysses_infer.parallel.layout import Mode


def test_decodes_of_a_hybrid_are_captured_and_its_prompts_run_layer_by_layer(tmp_path):
    pytest.importorskip("triton")
    Qwen3NextConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=0,
        mlp_only_layers=[0, 1],
        max_position_embeddings=256,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    with assume("meta", (9, 0)):
        rank = make_rank(tmp_path, 2)
        states = rank.worker.states
        assert states.scratch_slot == states.num_sequences < states.first_snapshot
        assert not capture(rank).kept, "memory that a step keeps"
        assert rank.worker.mixed_graphs is None
        run_step(rank, Mode(2, 1), (9, 1), eager=True)
        run_step(rank, Mode(1, 2), (1, 1), eager=False)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["glm5_next-shared", "qwen4_exp_text"])
def test_decodes_that_select_pools_and_look_up_ngrams_are_captured(name, tmp_path):
    pytest.importorskip("triton")
    config = config_of(name)
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    with assume("meta", (9, 0)):
        rank = make_rank(tmp_path, 2, **{"model.max_model_len": 128})
        assert rank.worker.cache.index_keys
        assert not capture(rank).kept, "memory that a step keeps"
        run_step(rank, Mode(2, 1), (9, 1), eager=True)
        run_step(rank, Mode(1, 2), (1, 1), eager=False)


@pytest.mark.parametrize(
    "kind",
    ["inkling2_text", *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("inkling_text", "zaya", "rwkv"))],
)
def test_decodes_that_read_the_tokens_before_are_captured(kind, tmp_path):
    """Their logits of relative positions and sinks per token go to the Triton kernel."""
    pytest.importorskip("triton")
    config = next(tiny_configs(kind))
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    with assume("meta", (9, 0)):
        rank = make_rank(tmp_path, 2, **{"model.max_model_len": 128})
        assert not capture(rank).kept, "memory that a step keeps"
        run_step(rank, Mode(2, 1), (9, 1), eager=True)
        run_step(rank, Mode(1, 2), (1, 1), eager=False)
