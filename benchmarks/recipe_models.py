"""Folders with the config.json of each recipe's model: the true numbers, as transformers' config classes write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.memory_table import read_config

ROOT = Path(__file__).parents[1]
FP8_CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}
FP8_BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
QWEN3_14B = {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40}
QWEN3_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.3-70b-fp8-8xh200": ("llama-3.3-70b", {"quantization_config": FP8_CHANNEL}),
    "llama-3.3-70b-fp8-8xh100": ("llama-3.3-70b", {"quantization_config": FP8_CHANNEL}),
    "qwen3-32b-fp8-8xh200": ("qwen3-32b", {"quantization_config": FP8_BLOCK}),
    "qwen3-32b-yarn-128k-8xh200": ("qwen3-32b", {"quantization_config": FP8_BLOCK}),
    "llama-4-scout-17b-16e-8xh200": ("llama-4-scout-17b-16e", {}),
    "qwen3-30b-a3b-8xh200": ("qwen3-30b-a3b", {}),
    "qwen3-14b-2x24gb": ("qwen3-32b", QWEN3_14B),
    "qwen3-8b-2x24gb": ("qwen3-32b", QWEN3_8B),
}
"""By recipe: the file in configs/models and what differs from it."""


def recipe_path(recipe: str) -> Path:
    """The file of a recipe."""
    return ROOT / "recipes" / f"{recipe}.yaml"


def write_config(recipe: str, folder: Path, layers: int | None = None) -> Path:
    """Write the config.json of the recipe's model to `folder`; layers: None for all of them."""
    name, changes = MODELS[recipe]
    config = read_config(ROOT / "configs" / "models" / f"{name}.json")
    text = config.get_text_config(decoder=True)
    for key, value in {**changes, **({"num_hidden_layers": layers} if layers else {})}.items():
        setattr(text if hasattr(text, key) else config, key, value)
    for key in ("layer_types", "no_rope_layers", "moe_layers"):
        if getattr(text, key, None):
            setattr(text, key, list(getattr(text, key))[: text.num_hidden_layers])
    config.save_pretrained(folder)
    return folder
