"""`load_config`: defaults, then the recipe, then overrides, each value checked when it is read."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from ulysses_infer.config.keys import all_keys
from ulysses_infer.config.schema import Config
from ulysses_infer.config.settings import (
    Setting,
    settings_of_arguments,
    settings_of_config,
    settings_of_file,
    settings_of_mapping,
)
from ulysses_infer.config.validation import validate, warn_ignored
from ulysses_infer.errors import ConfigError, first_line

Source = str | os.PathLike[str] | Mapping[str, Any] | Config | None
Overrides = Mapping[str, Any] | Iterable[str]


def load_config(
    source: Source = None,
    overrides: Overrides = (),
    *,
    strict_clash: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Build the configuration: overrides take precedence over the recipe, the recipe over the defaults.

    `source` is the path of a recipe, a mapping (nested or dotted keys, DeepSpeed's and vLLM's names included)
    or a `Config`. `overrides` is such a mapping, or command-line arguments such as `a.b=c` and
    `--tensor-parallel-size 2`. With `strict_clash` an override must not change a key that `source` gives. `defaults`
    are dotted keys that belong together: they replace the schema's defaults unless one of them is set.

    Raises a one-line ConfigError for an unknown key, a wrong type, a value out of range or a contradiction.

    """
    given = _source_settings(source)
    changes = _override_settings(overrides)
    tree = copy.deepcopy(_default_tree())
    if defaults and not any(setting.key in defaults for setting in (*given, *changes)):
        tree = _assign_all(tree, settings_of_mapping(defaults, "the training job"))
    tree = _assign_all(tree, given)
    if strict_clash:
        _refuse_clashes(tree, given, changes)
    config = _as_config(_assign_all(tree, changes))
    explicit = {setting.key: setting for setting in (*given, *changes)}
    validate(config, explicit)
    warn_ignored(config, explicit)
    return config


@functools.cache
def _default_tree() -> DictConfig:
    """The schema's defaults. Copying them takes a fifth of the time of making them."""
    tree: DictConfig = OmegaConf.structured(Config)
    return tree


def _source_settings(source: Source) -> list[Setting]:
    if source is None:
        return []
    if isinstance(source, Config):
        return settings_of_config(source)
    if isinstance(source, (str, os.PathLike)):
        return settings_of_file(Path(source))
    return settings_of_mapping(_plain(source), "the config dict")


def _override_settings(overrides: Overrides) -> list[Setting]:
    if isinstance(overrides, (Mapping, DictConfig)):
        return settings_of_mapping(_plain(overrides), "the arguments")
    return settings_of_arguments(list(overrides))


def _plain(mapping: Any) -> Mapping[str, Any]:
    if OmegaConf.is_config(mapping):
        mapping = OmegaConf.to_container(mapping, resolve=False)
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"config = {mapping!r}: give the path of a recipe, a dict or a Config")
    return mapping


def _assign_all(tree: DictConfig, settings: list[Setting]) -> DictConfig:
    for setting in settings:
        _assign(tree, setting)
    return tree


def _assign(tree: DictConfig, setting: Setting) -> None:
    """Convert one value to its key's type. Raises ConfigError with the expected type if it does not fit."""
    try:
        OmegaConf.update(tree, setting.key, setting.value, merge=False, force_add=True)
    except ValidationError as error:
        raise setting.complain(f"expected {_expected(setting.key)}") from error
    except OmegaConfBaseException as error:
        raise setting.complain(first_line(error)) from error


def _expected(name: str) -> str:
    return all_keys()[name].type_text if name in all_keys() else "a plain YAML value"


def _refuse_clashes(tree: DictConfig, given: list[Setting], changes: list[Setting]) -> None:
    """Raise ConfigError if a change contradicts the source's value of a key."""
    before = {setting.key: setting for setting in given}
    scratch = _assign_all(tree.copy(), changes)
    for change in changes:
        key, first = change.key, before.get(change.key)
        if first and OmegaConf.select(tree, key) != OmegaConf.select(scratch, key):
            raise ConfigError(
                f"{key} is {first.value!r} in {first.origin} but {change.value!r} in {change.origin}: give it once"
            )


def _as_config(tree: DictConfig) -> Config:
    try:
        missing = sorted(OmegaConf.missing_keys(tree))
        if missing:
            raise ConfigError(f"{missing[0]} is not set; give it in the recipe or as {missing[0]}=...")
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # an interpolation of an unknown key, or of a wrong type
        raise ConfigError(f"{error.full_key or 'recipe'}: {first_line(error)}") from error
    assert isinstance(config, Config)
    return config
