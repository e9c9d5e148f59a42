"""Checkpoints with random weights, generated once and cached: speed does not depend on the values of weights."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ulysses_infer.cache_folders import cache_folder
from ulysses_infer.errors import ConfigError

SHAPES: dict[str, dict[str, Any]] = {
    "llama-60m": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "llama-0.5b": {
        "vocab_size": 16384,
        "hidden_size": 1536,
        "intermediate_size": 4608,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "llama-0.5b-draft": {  # the vocabulary of llama-0.5b, and a twelfth of its weights
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 3584,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
"""The shapes used in this project's measurements, as differences from transformers' config; Llamas by default."""

MAX_POSITIONS = 8192
COMPLETE = "model.safetensors"


def random_model(name: str, folder: Path | None = None) -> Path:
    """The folder of a bfloat16 model with a shape from `SHAPES`, by default in the cache; created if necessary.

    Safe to call from several processes: one creates it, the others wait. Raises `ConfigError` for an unknown name.
    """
    if name not in SHAPES:
        raise ConfigError(f"there is no random model {name!r}; choose from {', '.join(SHAPES)}")
    target = folder or cache_folder("models") / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / COMPLETE).is_file() or not _has_shape(target, SHAPES[name]):
            _make(target, SHAPES[name])
    return target


def _has_shape(folder: Path, shape: dict[str, Any]) -> bool:
    made: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return all(made.get(key) == value for key, value in shape.items())


def _make(target: Path, shape: dict[str, Any]) -> None:
    """Write the checkpoint next to `target` and then rename it, so that `target` is never incomplete."""
    import torch

    if not torch.cuda.is_available():
        # transformers imports DeepSpeed, which logs that it probes for accelerators
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **{"model_type": "llama", "tie_word_embeddings": False, **shape},
        max_position_embeddings=MAX_POSITIONS,
        eos_token_id=None,
        bos_token_id=None,
    )
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(unfinished)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
