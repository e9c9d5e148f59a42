"""Reads a LoRA adapter in PEFT's format."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ulysses_infer.errors import CheckpointError, first_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])\.(?:default\.)?weight$")
UNSUPPORTED = {"use_dora": "DoRA", "lora_bias": "bias terms", "modules_to_save": "fully trained modules"}


@dataclass(frozen=True)
class LoraWeights:
    """An adapter's weights for one linear layer, which adds `scaling * (x @ down.T) @ up.T`."""

    down: torch.Tensor
    """[r, in features], PEFT's lora_A."""
    up: torch.Tensor
    """[out features, r], PEFT's lora_B."""
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """A named adapter: its weights by linear layer name. Source: Hu et al., LoRA, arXiv 2106.09685."""

    name: str
    layers: dict[str, LoraWeights]


def read_adapter(name: str, folder: Path) -> Adapter:
    """Read an adapter saved by PEFT's `save_pretrained`. Raises `CheckpointError` if that fails."""
    settings = _settings(name, folder)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in _tensors(name, folder).items():
        match = _KEY.match(key.removeprefix(PREFIX))
        if match is None:
            raise CheckpointError(f"adapter {name!r}: {WEIGHTS} holds {key!r}; only LoRA of linear layers is served")
        layers.setdefault(match["module"], {})[match["part"]] = tensor
    return Adapter(name, {module: _lora_weights(name, module, parts, settings) for module, parts in layers.items()})


def adapter_bytes(folder: Path) -> int:
    """Upper bound of an adapter's memory: its file size."""
    path = folder / WEIGHTS
    return path.stat().st_size if path.is_file() else 0


def _settings(name: str, folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"adapter {name!r}: {folder} has no {CONFIG}; give a folder that PEFT saved")
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"adapter {name!r}: {path} cannot be read: {first_line(error)}") from error
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"adapter {name!r} is of type {settings.get('peft_type')}; only LORA can be served")
    found = [words for key, words in UNSUPPORTED.items() if settings.get(key)]
    if settings.get("bias", "none") != "none":
        found.append(f"bias={settings['bias']!r}")
    if found:
        raise CheckpointError(f"adapter {name!r} has {', '.join(found)}, which cannot be served; train it without")
    return settings


def _tensors(name: str, folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"adapter {name!r}: {folder} has no {WEIGHTS}; save it with safe_serialization=True")
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"adapter {name!r}: {folder / WEIGHTS} cannot be read: {first_line(error)}") from error


def _lora_weights(
    name: str, module: str, parts: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> LoraWeights:
    if set(parts) != {"A", "B"} or parts["A"].dim() != 2 or parts["A"].shape[0] != parts["B"].shape[1]:
        raise CheckpointError(f"adapter {name!r}: lora_A and lora_B of {module} do not belong together")
    rank = parts["A"].shape[0]
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", rank))
    scaling = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    return LoraWeights(parts["A"], parts["B"], scaling)


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's per-layer values: a key is a regular expression that matches a suffix of the layer name."""
    for pattern, value in (patterns or {}).items():
        if re.search(rf"(?:^|\.){pattern}$", module):
            return value
    return default
