"""The probe at start refuses a model whose tokens depend on their neighbours or their index in the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import perturb
from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.injection.probe import probe
from ulysses_infer.model.model import ModelBuilder, ShiftModel
from ulysses_infer.parallel.layout import Layout, Mode


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def shifted(request: pytest.FixtureRequest) -> ShiftModel:
    """Rank 1 of 4 of a tiny random llama, which passed its own dry run."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    perturb(model)
    model.to(request.param)
    settings = ModelConfig(path="in memory")
    return ModelBuilder.from_pretrained(model, settings, Layout(Mode(2, 2)), 1, torch.device("cpu")).load(fuse=False)


def leak_neighbours(module: Any) -> None:
    """A convolution over tokens after the first feed-forward block."""
    module.model.layers[0].mlp.register_forward_hook(lambda _, __, output: output + output.roll(1, dims=1))


def count_positions(module: Any) -> None:
    """Rotary angles from the index in the batch."""
    rotary = module.model.rotary_emb
    plain = rotary.forward
    rotary.forward = lambda x, position_ids: plain(x, torch.arange(position_ids.shape[1])[None])


def skip_a_layer(module: Any) -> None:
    """A layer that never attends."""
    module.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)


def repeat_a_layer(module: Any) -> None:
    """Two layers that share a place in the cache."""
    module.model.layers[1].self_attn.layer_idx = 0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (leak_neighbours, "influence each other outside of attention"),
        (count_positions, "index in the batch"),
        (skip_a_layer, r"attention ran on layers \[0\]"),
        (repeat_a_layer, r"attention ran on layers \[0, 0\]"),
    ],
)
def test_models_that_mix_tokens_are_refused_with_the_reason(
    damage: Callable[[Any], None], reason: str, shifted: ShiftModel
) -> None:
    damage(shifted.module)
    with pytest.raises(UnsupportedModelError, match=f"model type 'llama' is not supported.*{reason}"):
        probe(shifted)


def test_errors_of_the_modeling_code_become_one_line(shifted: ShiftModel) -> None:
    shifted.injection.attention_layers[0].head_dim = 5  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match=r"'llama' does not run with sharded heads: RuntimeError: [^\n]+$"):
        probe(shifted)
