"""Recurrent layers of tiny random models, with widths that the C kernels take."""

from __future__ import annotations

from typing import Any

import torch

from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.tiny_models import model_class, perturb
from ulysses_infer.config import ModelConfig
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.model.recurrent.layer import RecurrentLayer
from ulysses_infer.parallel.layout import Layout, Mode

DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 80,
}
KIMI = {"linear_num_heads": 6, "linear_head_dim": 80}
MAMBA = {"mamba_d_state": 144, "mamba_d_head": 32, "mamba_n_heads": 8, "mamba_expand": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_next": DELTA,
    "qwen3_5_text": DELTA,
    "olmo_hybrid": {**DELTA, "linear_num_key_heads": 6},
    "kimi_linear": KIMI,
    "bailing_hybrid": {**KIMI, "layer_group_size": 2},
    "mamba2": {"state_size": 48, "head_dim": 32, "num_heads": 4},
    "nemotron_h": {"ssm_state_size": 144, "mamba_head_dim": 32, "time_step_min": 0.05},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 256, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
    "zamba2": {"mamba_headdim": 16, "mamba_d_state": 32},
    "bamba": MAMBA,
    "granitemoehybrid": MAMBA,
    "minimax": {"head_dim": 80, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"hidden_size": 96, "conv_bias": True},
    "lfm3": {"hidden_size": 96},
}
"""Widths that are multiples of 16, with and without a rest of the kernels' larger steps."""


def make_layer(
    kind: str, dtype: torch.dtype, shape: dict[str, Any], world_size: int = 1, shard: int = 0
) -> RecurrentLayer:
    """The first recurrent layer of a random model, loaded by one rank."""
    torch.manual_seed(3)
    config = next(tiny_configs(kind))
    for name, value in shape.items():
        setattr(config, name, value)
    model = model_class(config).from_config(config, dtype=torch.float32)
    perturb(model)
    for parameter in model.parameters():  # buffers stay in float32, as in loading
        parameter.data = parameter.data.to(dtype)
    builder = ModelBuilder.from_pretrained(
        model, ModelConfig("unused"), Layout(Mode(world_size, 1)), shard, torch.device("cpu")
    )
    layers = builder.load().injection.recurrent_layers
    return next(layer for layer in layers if isinstance(layer, RecurrentLayer))
