"""A checkpoint of which only config.json is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import CheckpointError, first_line
from ulysses_infer.model.loading.expected import ExpectedTensors
from ulysses_infer.model.loading.sources import Checkpoint
from ulysses_infer.model.model import read_config


@dataclass(frozen=True)
class ConfigOnly(Checkpoint):
    """Its weights are the tensors that a checkpoint of this config has, without values."""

    tensors: ExpectedTensors | None = None

    def open(self) -> ExpectedTensors:
        """See `Checkpoint.open`."""
        assert self.tensors is not None
        return self.tensors


def read_config_only(settings: ModelConfig) -> ConfigOnly:
    """The config of `model.path`: a folder, a config.json or a hub id, of which only config.json is loaded.

    Raises `CheckpointError`.
    """
    folder = _folder_of_config(settings)
    config = read_config(folder, settings.trust_remote_code)
    return ConfigOnly(folder, tensors=ExpectedTensors.of(config, settings))


def _folder_of_config(settings: ModelConfig) -> Path:
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
