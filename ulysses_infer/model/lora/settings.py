"""The settings of a LoRA adapter: those that are served as PEFT applies them; any other is refused by its name."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ulysses_infer.errors import CheckpointError, first_line

CONFIG = "adapter_config.json"

MERGE = "merge it into the model with PEFT's merge_and_unload and serve the result"
CONVERT = "save it again with PEFT's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA"
RETRAIN = "train it as an ordinary LoRA"

REFUSED: dict[str, tuple[str, str]] = {  # by field of PEFT's LoraConfig: what it does, the remedy
    "alora_invocation_tokens": ("activated LoRA, which acts on part of the text", RETRAIN),
    "arrow_config": ("Arrow routing between adapters", RETRAIN),
    "kasa_config": ("KaSA, which changes the base weights", MERGE),
    "layer_replication": ("a model with repeated layers", MERGE),
    "lora_bias": ("bias terms", MERGE),
    "megatron_config": ("layers of Megatron", RETRAIN),
    "modules_to_save": ("fully trained modules", MERGE),
    "target_parameters": ("LoRA of parameters outside linear layers", MERGE),
    "trainable_token_indices": ("trained token embeddings", MERGE),
    "use_bdlora": ("block-diagonal LoRA", MERGE),
    "use_dora": ("DoRA", MERGE),
    "use_qalora": ("QA-LoRA", RETRAIN),
}

READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights"}

IGNORED = {  # no effect on the output of an adapter whose tensors are given
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),  # the tensors name their layers
    *("ensure_weight_tying", "fan_in_fan_out", "megatron_core", "qalora_group_size"),  # of what is refused, or storage
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of an initialisation, see INITIALISATIONS
    *("lora_dropout", "monteclora_config", "runtime_config", "velora_config"),  # act in training only
    "merge_weights",  # of PEFT's first versions
}

INITIALISATIONS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
"""The values of `init_lora_weights`, in lower case, that leave the base weights as they are."""


@dataclass(frozen=True)
class LoraSettings:
    """The settings that determine how an adapter's tensors are applied."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def rank_of(self, module: str) -> int:
        """The rank of the layer `module`."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """The factor of the product of the layer's two matrices."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def check_settings(name: str, values: Mapping[str, Any]) -> LoraSettings:
    """The settings of adapter `name` in its adapter_config.json. Raises `CheckpointError` for what is not served."""
    if values.get("peft_type") != "LORA":
        kind = values.get("peft_type")
        raise CheckpointError(f"adapter {name!r} is of type {kind}; only LORA can be served: {MERGE}, or train a LoRA")
    for key, value in values.items():
        reason = _refusal(key, value)
        if reason is not None:
            raise CheckpointError(f"adapter {name!r}: {key}={reprlib.repr(value)} in {CONFIG} {reason}")
    return LoraSettings(
        rank=values.get("r", 8),
        alpha=values.get("lora_alpha", 8),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
        use_rslora=bool(values.get("use_rslora")),
    )


def _refusal(key: str, value: Any) -> str | None:
    """Why the setting is not served, with the remedy; None if it is."""
    if key == "init_lora_weights":
        return _refused_initialisation(str(value).lower())
    if key == "bias":
        return None if value in (None, "none") else f"(trained biases of the model) cannot be served; {MERGE}"
    if key in READ:
        return _wrong_value(key, value)
    if key in IGNORED or not value:
        return None
    if key in REFUSED:
        meaning, remedy = REFUSED[key]
        return f"({meaning}) cannot be served; {remedy}"
    return f"is unknown; remove it if the output does not depend on it, otherwise {MERGE}"


def _refused_initialisation(value: str) -> str | None:
    if value in INITIALISATIONS:
        return None
    if value == "loftq":
        remedy = "serve the LoftQ base model and set init_lora_weights to true, as PEFT's LoftQ guide does"
        return f"(LoftQ, which quantizes the base weights) cannot be served; {remedy}"
    if value in ("corda", "lora_ga", "olora") or value.startswith("pissa"):
        return f"changes the base weights at the start of training; {CONVERT}"
    return f"is unknown; known: {', '.join(INITIALISATIONS)}"


def _wrong_value(key: str, value: Any) -> str | None:
    """What is wrong with a value that is read; None if it can be used."""
    if key.endswith("_pattern"):
        if not isinstance(value, dict | None):
            return "must map layer names to numbers"
        return next(
            (wrong for pattern, number in (value or {}).items() if (wrong := _wrong_entry(pattern, number))), None
        )
    if key in ("r", "lora_alpha") and not _is_number(value, whole=key == "r"):
        return "must be a positive number"
    return None


def _wrong_entry(pattern: str, number: Any) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"has {pattern!r}, which is not a regular expression ({first_line(error)})"
    return None if _is_number(number) else f"must have a positive number for {pattern!r}"


def _is_number(value: Any, whole: bool = False) -> bool:
    kinds = (int,) if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and value > 0


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's values by layer: the first key that matches the end of the layer's name counts."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
