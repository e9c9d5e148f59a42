"""`model.hf_overrides`: changes of transformers' config before the model is built."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from ulysses_infer.config.keys import nearest_name
from ulysses_infer.errors import CheckpointError, ConfigError, first_line

KEY = "model.hf_overrides"
ROPE_NAMES = ("rope_parameters", "rope_scaling")  # transformers' own name, and the one before its version 5
ROPE_KINDS = ("default", *ROPE_INIT_FUNCTIONS)
OF_EVERY_KIND = ("rope_theta", "partial_rotary_factor", "mrope_section")
DEFAULT_LAYERS = "full_attention"
"""The layers whose rotary embedding is meant by an override without layer types, as transformers reads old checkpoints.
"""

# With these changed, weights would load by accident and give wrong results.
WEIGHTS = "the checkpoint's weights can be read in one way only"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("head_dim", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"),
        WEIGHTS,
    ),
    **dict.fromkeys(("architectures", "auto_map", "model_type"), "it names the checkpoint's architecture"),
    **dict.fromkeys(("dtype", "torch_dtype"), "set model.dtype instead"),
    "quantization_config": "it says how the checkpoint's weights are stored",
}

REFUSALS = (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, StrictDataclassError)
"""Exceptions that transformers' setters and validators raise for unsupported values."""


def overridden(config: Any, overrides: Mapping[str, Any]) -> Any:
    """A copy of transformers' `config` with `overrides` in its language model's part; itself without any.

    A mapping for rope_parameters (or rope_scaling) changes the keys it has; with another rope_type it starts anew, but
    for what every kind has. Fewer num_hidden_layers leave out the last ones. Raises `ConfigError`, one line, for what
    is unknown, refused, or not accepted by transformers' own validation.
    """
    if not overrides:
        return config
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    wanted = _of_text_config(config, text, overrides)
    known = _names(text)
    for name, value in wanted.items():
        _check_name(text, name, known)
        if name in ROPE_NAMES:
            _set_rope(text, value)
        elif name == "num_hidden_layers":
            _leave_out_layers(text, value)
        else:
            _set(text, name, value)
    _validate(text)
    return config


def _of_text_config(config: Any, text: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides, with those nested under the name of the language model's config (text_config) merged in."""
    owners = [name for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is text]
    wanted: dict[str, Any] = {}
    for name, value in overrides.items():
        wanted |= _mapping(name, value) if name in owners else {name: value}
    return wanted


def _names(text: Any) -> dict[str, str]:
    """Attributes of the language model's config by each of their names, without those that every config has."""
    own = {field.name for field in dataclasses.fields(text)} if dataclasses.is_dataclass(text) else set()
    own |= {name for name in vars(text) if not name.startswith("_")}
    own -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
    if hasattr(text, "rope_parameters"):
        own |= set(ROPE_NAMES)
    names = {name: name for name in own}
    for standard, name in text.attribute_map.items():
        names |= {standard: standard, name: standard}
    return names


def _check_name(text: Any, name: str, known: Mapping[str, str]) -> None:
    reason = REFUSED.get(known.get(name, name))
    if reason is not None:
        raise ConfigError(f"{KEY}.{name} cannot be changed: {reason}")
    if name in known:
        return
    if name in RopeParameters.__annotations__ and "rope_parameters" in known:
        raise ConfigError(f"unknown key '{KEY}.{name}'; did you mean '{KEY}.rope_parameters.{name}'?")
    raise ConfigError(f"unknown key '{KEY}.{name}' for model type {text.model_type!r}; {_hint(name, known)}")


def _hint(name: str, known: Iterable[str]) -> str:
    nearest = nearest_name(name, known)
    return f"did you mean '{nearest}'?" if nearest else f"known: {', '.join(sorted(known))}"


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{KEY}.{name} = {value!r}: give its keys, as in {KEY}.{name}.key=value")
    return dict(value)


def _set(text: Any, name: str, value: Any) -> None:
    try:
        setattr(text, name, value)
    except REFUSALS as error:
        raise _complaint(name, value, error) from error


def _complaint(name: str, value: Any, error: Exception) -> ConfigError:
    return ConfigError(f"{KEY}.{name} = {value!r}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """transformers' objection in one line: its validators put the reason into the cause, below a headline."""
    return first_line(error.__cause__ or error).strip("'\"")


def _leave_out_layers(text: Any, count: Any) -> None:
    """The model of its first `count` layers, for experiments; lists per layer are shortened too."""
    before = text.num_hidden_layers
    if type(count) is not int or not 1 <= count <= before:
        raise ConfigError(f"{KEY}.num_hidden_layers = {count!r}: the checkpoint has {before}; give 1 to {before}")
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            _set(text, name, value[:count])
    text.num_hidden_layers = count


# -- rotary embeddings ---------------------------------------------------------------------------------------------


def _set_rope(text: Any, value: Any) -> None:
    """Change the rotary embeddings, and have transformers validate them as a whole."""
    given, current = _mapping("rope_parameters", value), copy.deepcopy(text.rope_parameters or {})
    nested = text.nested_rope_parameter_keys(current)
    if not nested:
        wanted = _merged(text, current, given, "rope_parameters")
    else:
        by_layers = given if set(given) & set(nested) else {DEFAULT_LAYERS: given}
        for layers in by_layers:
            if layers not in nested:
                raise ConfigError(f"unknown key '{KEY}.rope_parameters.{layers}'; {_hint(layers, nested)}")
            if current[layers] is None:
                raise ConfigError(f"{KEY}.rope_parameters: {layers} layers of this model have no rotary embedding")
        wanted = current | {
            layers: _merged(text, current[layers], _mapping(f"rope_parameters.{layers}", own), layers)
            for layers, own in by_layers.items()
        }
    try:
        text.rope_parameters = copy.deepcopy(wanted)
        with _objections() as objections:
            text.standardize_rope_params()
            text.validate_rope()
    except REFUSALS as error:
        raise _complaint("rope_parameters", value, error) from error
    if objections:
        raise ConfigError(f"{KEY}.rope_parameters = {value!r}: {objections[0]}")
    _check_kept(wanted, text.rope_parameters)


def _merged(text: Any, current: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`given` over `current`, or over what of it belongs to every kind where the kind is another."""
    given = dict(given)
    if "type" in given:  # as it was spelled before transformers 5
        given["rope_type"] = given.pop("type")
    kind = given.get("rope_type", current.get("rope_type", "default"))
    if kind not in ROPE_KINDS:
        raise ConfigError(f"{KEY}: rope_type {kind!r} of {where} is unknown; choose from {', '.join(ROPE_KINDS)}")
    known = {*RopeParameters.__annotations__, *(text.ignore_keys_at_rope_validation or ()), *current}
    for name in given:
        if name not in known:
            hint = _hint(name, {*known, *text.nested_rope_parameter_keys(text.rope_parameters)} - {"type"})
            raise ConfigError(f"unknown key '{KEY}.rope_parameters.{name}'; {hint}")
    if kind == current.get("rope_type", "default"):
        return {**current, **given}
    return {**{name: value for name, value in current.items() if name in OF_EVERY_KIND}, **given}


def _check_kept(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if transformers replaced the values, as it does for phi3 and similar models."""
    for name, value in wanted.items():
        if found.get(name) != value and not isinstance(value, Mapping):
            raise ConfigError(
                f"{KEY}.rope_parameters.{name} = {value!r}: this model type takes it from its own key; set {KEY}.{name}"
            )


@contextmanager
def _objections() -> Iterator[list[str]]:
    """What transformers' validation of rotary embeddings only warns of, to be refused here. What it says once in a
    process is advice."""
    log, objections = logging.getLogger("transformers.modeling_rope_utils"), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: (  # type: ignore[method-assign]
        None if record.funcName == "warning_once" else objections.append(record.getMessage())
    )
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    log.propagate = False
    try:
        yield objections
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


def _validate(text: Any) -> None:
    """transformers' checks of values that must agree."""
    try:
        if hasattr(text, "validate"):
            text.validate()
    except REFUSALS as error:
        raise ConfigError(f"{KEY} makes a config that transformers refuses: {_reason(error)}") from error


@contextmanager
def blamed(overrides: Mapping[str, Any]) -> Iterator[None]:
    """Mention the overrides in errors about weights that do not fit, because they may be the reason."""
    try:
        yield
    except CheckpointError as error:
        if not overrides:
            raise
        raise CheckpointError(f"{error} ({KEY} changes {', '.join(overrides)})") from error
