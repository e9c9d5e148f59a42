"""Repairs published config.json files with values that transformers no longer reads, or never has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ulysses_infer.model.loading.files import read_json_object

# By model type and name: converts the released value to the intended one.
RELEASED: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("llama4_text", "attn_temperature_tuning"): bool,  # Llama 4 Scout and Maverick have 4 for true
}

SAME_ARCHITECTURE = {"mimo": "qwen2"}
"""Model types that transformers lacks, and those of which they are other names."""


def legacy_config(folder: Path) -> Any | None:
    """transformers' config of a folder whose config.json has such values; None if it has none.

    Raises `CheckpointError` if it cannot be read.
    """
    from transformers import CONFIG_MAPPING

    values = read_json_object(folder / "config.json")
    return CONFIG_MAPPING[values["model_type"]].from_dict(values) if repair(values) else None


def repair(values: dict[str, Any]) -> bool:
    """Convert `values` of a config.json to the form that transformers reads. Returns whether any changed."""
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    return sum(_repair_part(part) for part in parts) > 0


def _repair_part(values: dict[str, Any]) -> int:
    """How many of `values`, of a model or a part of one, changed."""
    if values.get("model_type") in SAME_ARCHITECTURE:
        values["model_type"] = SAME_ARCHITECTURE[values["model_type"]]
        values.pop("auto_map", None)  # of the code that came with the checkpoint
        return 1
    found = [(name, meant) for (kind, name), meant in RELEASED.items() if kind == values.get("model_type")]
    changed = {name: meant(values[name]) for name, meant in found if type(values.get(name)) is int}
    values |= changed
    return len(changed)
