"""The arguments of `init_inference`: a model and a configuration, by position or by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ulysses_infer.config.loading import Overrides
from ulysses_infer.errors import ConfigError


def chosen_arguments(model: Any, config: Any, surplus: tuple[Any, ...], overrides: dict[str, Any]) -> tuple[Any, Any]:
    """The model and the configuration, positional or taken from `overrides` by name; a mapping `model=` is a section
    of the recipe and stays there. Raises `ConfigError`."""
    if surplus:
        raise ConfigError(f"{2 + len(surplus)} positional arguments; give a model, a config, and the rest by name")
    if "model" in overrides and not isinstance(overrides["model"], Mapping):
        if model is not None:
            raise ConfigError(f"two models, {model!r:.80} and {overrides['model']!r:.80}; give one")
        model = overrides.pop("model")
    if "config" in overrides:
        if config is not None:
            raise ConfigError(f"two configs, {config!r:.80} and {overrides['config']!r:.80}; give one")
        config = overrides.pop("config")
    if isinstance(model, Mapping):
        raise ConfigError("the model is a mapping; give a hub id, a folder or a model, or the mapping as model=...")
    return model, config


def with_model(model: Any, overrides: Mapping[str, Any]) -> Overrides:
    """The overrides, with the name of the model in them."""
    if model is None:
        return overrides
    if not isinstance(model, str | os.PathLike):
        return {**overrides, "model.path": getattr(model, "name_or_path", "") or "(a model in memory)"}
    return {**overrides, "model.path": os.fspath(model)}
