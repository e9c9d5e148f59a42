"""The generation config of a checkpoint: the tokens that end a text, and the sampling that its authors recommend."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.model.loading.files import read_json_object
from ulysses_infer.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
SAMPLING_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""The keys that set defaults of requests, with their names in `SamplingParams`; the same ones as in vLLM."""


def load_generation_config(folder: Path | None, model: Any = None) -> dict[str, Any]:
    """The generation config of a folder, else of a model in memory; empty without one. Raises `CheckpointError`."""
    if folder is not None and (folder / FILE).is_file():
        return read_json_object(folder / FILE)
    own = getattr(model, "generation_config", None)
    return {} if own is None else dict(own.to_dict())


def eos_token_ids(generation: Mapping[str, Any], folder: Path | None, config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: those of the generation config, of the model's config and of the tokenizer together.

    Chat fine-tunes often change only one of the three. A value of the model's `config` that no file states is the
    default of its class, which counts only if nothing else names a token.
    """
    found = _token_ids(generation.get("eos_token_id")) | _stated_in_config(folder)
    found |= _token_ids(getattr(tokenizer, "eos_token_id", None))
    return found or _token_ids(getattr(config, "eos_token_id", None))


def _stated_in_config(folder: Path | None) -> frozenset[int]:
    if folder is None or not (folder / "config.json").is_file():
        return frozenset()
    stated = read_json_object(folder / "config.json")
    text = stated.get("text_config")
    inner = text.get("eos_token_id") if isinstance(text, dict) else None
    return _token_ids(stated.get("eos_token_id")) | _token_ids(inner)


def _token_ids(value: Any) -> frozenset[int]:
    """Token ids given as one or as a list; anything else in the place of an id is ignored."""
    values = value if isinstance(value, list) else [value]
    return frozenset(token for token in values if isinstance(token, int) and not isinstance(token, bool))


def sampling_defaults(settings: ModelConfig, generation: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `SamplingParams` that apply to a request which does not set them.

    generation: the checkpoint's own config, which `model.generation_config` can replace. Raises `ConfigError`.
    """
    source, values = f"the checkpoint's {FILE}", generation
    if settings.generation_config == "none":
        values = {}
    elif settings.generation_config != "auto":
        source, values = f"{settings.generation_config}/{FILE}", _of_folder(settings.generation_config)
    defaults = _valid(values, source)
    for key, value in settings.override_generation_config.items():
        _check_key(key)
        defaults.pop(SAMPLING_FIELDS[key], None)  # null: the neutral value
        defaults |= _checked(key, value)
    if defaults:
        listed = ", ".join(f"{name}={value}" for name, value in defaults.items())
        logger.info("requests that do not say otherwise use %s (model.generation_config=none: neutral values)", listed)
    return defaults


def _of_folder(folder: str) -> dict[str, Any]:
    path = Path(folder).expanduser() / FILE
    if not path.is_file():
        raise ConfigError(f"model.generation_config is {folder!r}, which has no {FILE}; use auto, none or a folder")
    return read_json_object(path)


def _valid(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The recommended values; one that no request could have is left out with a warning."""
    defaults: dict[str, Any] = {}
    for key in SAMPLING_FIELDS:
        try:
            defaults |= _checked(key, values.get(key))
        except ConfigError as error:
            logger.warning("%s: %s; ignored", source, error)
    return defaults


def _checked(key: str, value: Any) -> dict[str, Any]:
    """The default that one key sets; empty for null. Raises `ConfigError`."""
    if value is None:
        return {}
    name = SAMPLING_FIELDS[key]
    try:
        return {name: getattr(SamplingParams(**{name: value}), name)}
    except RequestError as error:
        raise ConfigError(str(error).replace(name, key, 1)) from error


def _check_key(key: str) -> None:
    if key not in SAMPLING_FIELDS:
        known = ", ".join(SAMPLING_FIELDS)
        raise ConfigError(f"unknown key {key!r} in model.override_generation_config; known: {known}")
