"""Finds the config.json of a checkpoint, without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import CheckpointError, first_line, kind_and_line
from ulysses_infer.model.definitions.registration import register_definitions
from ulysses_infer.model.loading.legacy_configs import repair


def folder_of_config(settings: ModelConfig) -> Path:
    """The folder with the config.json of `model.path`: a folder, a config.json or a hub id, of which only config.json
    is loaded. Raises `CheckpointError`.
    """
    path = Path(settings.hf_config or settings.path).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.name == "config.json":
        return path.parent
    if path.exists() or path.is_absolute() or settings.path.count("/") != 1:
        raise CheckpointError(f"model.path {str(path)!r} is no folder, config.json or hub id (owner/name)")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(settings.path, "config.json", revision=settings.revision)).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"the config.json of {settings.path!r} could not be loaded from the hub ({first_line(error)}); give a "
            "folder or a config.json as model.path, or check the name, your access and the network"
        ) from error


def read_config_file(path: Path) -> Any:
    """transformers' config of a JSON file of any name. Raises `CheckpointError` if it is none."""
    from transformers import CONFIG_MAPPING

    register_definitions()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        repair(values)
        return CONFIG_MAPPING[values["model_type"]](**values)
    except Exception as error:  # transformers does not check every value
        raise CheckpointError(f"'{path}' is not a config.json of transformers: {kind_and_line(error)}") from error
