"""Reads a LoRA adapter in PEFT's format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ulysses_infer.errors import CheckpointError, first_line
from ulysses_infer.model.loading.files import read_json_object
from ulysses_infer.model.lora.settings import CONFIG, MERGE, LoraSettings, check_settings

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])\.(?:default\.)?weight$")
_OF_TRAINING = re.compile(r"\.lora_(velora_embed|monteclora_sampler)(\.|$)")
"""Keys of variants that act in training only."""


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
        if _OF_TRAINING.search(key):
            continue
        match = _KEY.match(key.removeprefix(PREFIX))
        if match is None:
            raise CheckpointError(
                f"adapter {name!r}: {WEIGHTS} holds {key!r}; only LoRA of linear layers is served: {MERGE}"
            )
        layers.setdefault(match["module"], {})[match["part"]] = tensor
    return Adapter(name, {module: _lora_weights(name, module, parts, settings) for module, parts in layers.items()})


def adapter_bytes(folder: Path) -> int:
    """Upper bound of an adapter's memory: its file size."""
    path = folder / WEIGHTS
    return path.stat().st_size if path.is_file() else 0


def _settings(name: str, folder: Path) -> LoraSettings:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"adapter {name!r}: {folder} has no {CONFIG}; give a folder that PEFT saved")
    return check_settings(name, read_json_object(path))


def _tensors(name: str, folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"adapter {name!r}: {folder} has no {WEIGHTS}; save it with safe_serialization=True")
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"adapter {name!r}: {folder / WEIGHTS} cannot be read: {first_line(error)}") from error


def _lora_weights(name: str, module: str, parts: Mapping[str, torch.Tensor], settings: LoraSettings) -> LoraWeights:
    if set(parts) != {"A", "B"} or parts["A"].dim() != 2 or parts["A"].shape[0] != parts["B"].shape[1]:
        raise CheckpointError(f"adapter {name!r}: lora_A and lora_B of {module} do not belong together")
    rank, expected = parts["A"].shape[0], settings.rank_of(module)
    if rank != expected:
        raise CheckpointError(
            f"adapter {name!r}: the matrices of {module} have rank {rank}, but {CONFIG} says {expected}; "
            "the two files do not belong together"
        )
    return LoraWeights(parts["A"], parts["B"], settings.scaling_of(module))
