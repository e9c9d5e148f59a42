"""What adapters add to a model without running it: slopes, rotations, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.adapters.alibi import geometric_slopes, mpt_slopes
from ulysses_infer.model.adapters.rotary import rotate_halves, rotate_pairs
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.parallel.layout import Layout, Mode


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 14, 32, 71, 112])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    torch.testing.assert_close(geometric_slopes(heads), _get_alibi_slopes(heads, torch.device("cpu")))
    bias = build_mpt_alibi_tensor(heads, 5)  # [heads, 1, 5], 0 at the last position
    torch.testing.assert_close(-bias[:, 0, 3], mpt_slopes(heads))


@pytest.mark.parametrize("rotated", [4, 8])
def test_rotations_are_those_of_transformers(rotated: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 3, 5, 8, generator=generator)
    angles = torch.randn(1, 5, rotated // 2, generator=generator)
    cosine, sine = angles.cos(), angles.sin()
    halves = torch.cat((cosine, cosine), -1), torch.cat((sine, sine), -1)
    expected = modeling_llama.apply_rotary_pos_emb(query[..., :rotated], key[..., :rotated], *halves)[0]
    torch.testing.assert_close(rotate_halves(query, *halves), torch.cat((expected, query[..., rotated:]), -1))
    tokens_first = modeling_gptj.apply_rotary_pos_emb(query[..., :rotated].transpose(1, 2), sine, cosine)
    expected = torch.cat((tokens_first.transpose(1, 2), query[..., rotated:]), -1)
    torch.testing.assert_close(rotate_pairs(query, cosine, sine), expected)


TINY = {"vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12}
FALCON = {**TINY, "new_decoder_architecture": True, "num_kv_heads": 2}
CODEGEN = {"vocab_size": 32, "n_embd": 48, "n_layer": 2, "n_head": 12, "rotary_dim": 4}


@pytest.mark.parametrize(
    ("model_type", "values", "ranks", "why"),
    [
        ("bert", TINY, 1, "model type 'bert' is an encoder; only checkpoints with is_decoder: true are served"),
        ("bart", {"vocab_size": 32}, 1, "model type 'bart' is an encoder-decoder; only its decoder alone is served"),
        ("big_bird", {**TINY, "is_decoder": True}, 1, "BigBird is served with attention_type original_full only"),
        ("falcon", FALCON, 8, "12 query heads in 2 groups, each packed with its key and value, do not divide over 8"),
        ("codegen", CODEGEN, 3, "CodeGen stores its 12 heads in 4 blocks, which do not divide over 3 ranks"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    model_type: str, values: dict[str, Any], ranks: int, why: str
) -> None:
    def no_weights() -> Any:
        raise AssertionError("weights were asked for")

    config, layout = CONFIG_MAPPING[model_type](**values, tie_word_embeddings=False), Layout(Mode(ranks, 1))
    with pytest.raises(UnsupportedModelError) as error:
        ModelBuilder(config, no_weights, ModelConfig(path="-"), layout, 0, torch.device("cpu"))
    assert why in str(error.value)
    assert "\n" not in str(error.value)
