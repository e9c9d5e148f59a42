"""A checkpoint of which only config.json is read."""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_infer.config import ModelConfig
from ulysses_infer.model.loading.config_folder import folder_of_config
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
    folder = folder_of_config(settings)
    config = read_config(folder, settings.trust_remote_code)
    return ConfigOnly(folder, tensors=ExpectedTensors.of(config, settings))
