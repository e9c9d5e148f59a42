"""Makes a policy from its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ulysses_infer.config import Config, PolicyConfig, load_config
from ulysses_infer.engine.policies.adaptive import AdaptivePolicy
from ulysses_infer.engine.policies.policy import Policy
from ulysses_infer.engine.policies.static import StaticPolicy
from ulysses_infer.engine.policies.threshold import ThresholdPolicy
from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.layout import Mode

POLICIES = (StaticPolicy.name, ThresholdPolicy.name, AdaptivePolicy.name)
"""Names of the available policies."""


def make_policy(config: PolicyConfig, modes: Sequence[Mode], base: Mode, shift: Mode) -> Policy:
    """The policy that `config` asks for, over the loaded `modes`.

    "sp" means `base`, "tp" means `shift` (full tensor parallelism). An adaptive policy has no step times yet. Raises
    `ConfigError` for an unknown policy or a mode that is not loaded.
    """
    if config.name == "static":
        mode = _static_mode(config.mode, base, shift)
        _check_loaded([mode], modes, config.name)
        return StaticPolicy(mode)
    if config.name == "threshold":
        _check_loaded([base, shift], modes, config.name)
        return ThresholdPolicy(base, shift, _threshold(config.threshold_tokens))
    if config.name == "adaptive":
        return AdaptivePolicy(modes, config)
    raise ConfigError(f"policy.name {config.name!r} is unknown; use {', '.join(POLICIES)}")


def policy_settings(config: Config, name: str, settings: Mapping[str, Any]) -> PolicyConfig:
    """Settings for a change at run time, checked like the `policy` section of a recipe.

    Raises `ConfigError` for an unknown policy or setting, or a mode that is not loaded.
    """
    tree: dict[str, Any] = {"model.path": config.model.path, "policy.name": name}
    parallel = config.parallel
    tree |= {"parallel.sp": parallel.sp, "parallel.tp": parallel.tp, "parallel.modes": parallel.modes}
    tree["scheduler.enable_chunked_prefill"] = config.scheduler.enable_chunked_prefill
    return load_config(None, {**tree, **{f"policy.{key}": value for key, value in settings.items()}}).policy


def _static_mode(value: Any, base: Mode, shift: Mode) -> Mode:
    if value is None or value == "sp":
        return base
    if value == "tp":
        return shift
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(pair) != 2 or not all(type(part) is int for part in pair):
        raise ConfigError(f"policy.mode {value!r} is not a mode; use sp, tp or [sp, tp]")
    return Mode(*pair)


def _threshold(tokens: Any) -> int:
    if type(tokens) is not int or tokens < 0:
        raise ConfigError(f"policy.threshold_tokens {tokens!r} is not a token count; use an integer from 0 up")
    return tokens


def _check_loaded(needed: Sequence[Mode], modes: Sequence[Mode], policy: str) -> None:
    for mode in needed:
        if mode not in modes:
            loaded = ", ".join(f"[{sp}, {tp}]" for sp, tp in modes)
            raise ConfigError(
                f"policy {policy} needs mode [{mode.sp}, {mode.tp}], which is not loaded; "
                f"use one of {loaded}, or add it to parallel.modes"
            )
