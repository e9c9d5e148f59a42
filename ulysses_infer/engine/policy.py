"""Which mode a step runs in. A policy is one object; changing it at run time is swapping the object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ulysses_infer.config import Config, PolicyConfig, load_config
from ulysses_infer.engine.batch import Batch
from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.layout import Mode


class Policy(Protocol):
    """Chooses the mode of every step. Asked on rank 0 only, once per non-empty batch."""

    @property
    def name(self) -> str:
        """The policy's name in recipes."""

    def choose(self, batch: Batch) -> Mode:
        """The mode that `batch` runs in, one of the loaded ones."""

    def describe(self) -> dict[str, Any]:
        """The policy's name and settings as plain values, for `stats()` and reports."""


class StaticPolicy:
    """Always the same mode: plain tensor parallelism, plain Ulysses or a fixed mixture of the two.

    Source: the baselines (TP, SP) of Hidayetoglu et al., "Shift Parallelism", arXiv 2509.16495.
    """

    name = "static"

    def __init__(self, mode: Mode) -> None:
        self.mode = mode

    def choose(self, batch: Batch) -> Mode:
        """`mode`, whatever the batch."""
        return self.mode

    def describe(self) -> dict[str, Any]:
        """Name and mode."""
        return {"name": self.name, "mode": list(self.mode)}


class ThresholdPolicy:
    """The base mode for steps of more than `threshold_tokens` tokens, the shift mode for the others.

    Large steps are bound by compute and communication, where sequence parallelism is the cheaper one; small
    steps by reading weights, which tensor parallelism splits over all ranks. Source: Hidayetoglu et al.,
    "Shift Parallelism", arXiv 2509.16495, Algorithm 2.
    """

    name = "threshold"

    def __init__(self, base: Mode, shift: Mode, threshold_tokens: int) -> None:
        self.base = base
        self.shift = shift
        self.threshold_tokens = threshold_tokens

    def choose(self, batch: Batch) -> Mode:
        """By the number of batched tokens, prefill chunks and decodes alike."""
        return self.base if batch.num_tokens > self.threshold_tokens else self.shift

    def describe(self) -> dict[str, Any]:
        """Name, threshold and the two modes."""
        return {
            "name": self.name,
            "threshold_tokens": self.threshold_tokens,
            "base": list(self.base),
            "shift": list(self.shift),
        }


def make_policy(config: PolicyConfig, modes: Sequence[Mode], base: Mode, shift: Mode) -> Policy:
    """The policy that `config` asks for, among the loaded `modes`.

    "sp" means `base`, "tp" means `shift` (full tensor parallelism). Raises ConfigError for an unknown policy
    or a mode that is not loaded.
    """
    if config.name == "static":
        mode = _static_mode(config.mode, base, shift)
        _check_loaded([mode], modes, config.name)
        return StaticPolicy(mode)
    if config.name == "threshold":
        _check_loaded([base, shift], modes, config.name)
        return ThresholdPolicy(base, shift, _threshold(config.threshold_tokens))
    if config.name == "adaptive":
        raise ConfigError("policy.name adaptive is not available yet; use threshold or static")
    raise ConfigError(f"policy.name {config.name!r} is unknown; use threshold or static")


def policy_settings(config: Config, name: str, settings: Mapping[str, Any]) -> PolicyConfig:
    """Settings for a change at run time, checked like a recipe's `policy` section against this engine's layout.

    Raises `ConfigError` for an unknown policy or setting, or a mode that is not loaded.
    """
    tree: dict[str, Any] = {"model.path": config.model.path, "policy.name": name}
    parallel = config.parallel
    tree |= {"parallel.sp": parallel.sp, "parallel.tp": parallel.tp, "parallel.modes": parallel.modes}
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
        raise ConfigError(
            f"policy.threshold_tokens {tokens!r} is not a token count; use an integer from 0 up"
        )
    return tokens


def _check_loaded(needed: Sequence[Mode], modes: Sequence[Mode], policy: str) -> None:
    for mode in needed:
        if mode not in modes:
            loaded = ", ".join(f"[{sp}, {tp}]" for sp, tp in modes)
            raise ConfigError(
                f"policy {policy} needs mode [{mode.sp}, {mode.tp}], which is not loaded; "
                f"use one of {loaded}, or add it to parallel.modes"
            )
