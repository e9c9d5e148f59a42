"""Measured step times in a file, with the machine and model they hold for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ulysses_infer.atomic_files import write_atomically
from ulysses_infer.cache_folders import cache_folder
from ulysses_infer.errors import ConfigError, first_line
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.model import Measurement
from ulysses_infer.step_time.step_shape import StepShape

FORMAT = 1
IDENTITY = ("model", "modes", "device")
"""The part of a key that names the file in the cache; the rest decides whether its content is valid."""

Key = Mapping[str, Any]


@dataclass
class Profile:
    """Measured steps, and the conditions they were measured under."""

    key: dict[str, Any]
    """Model, modes, device, threads, versions, ...: plain values. The times are valid where all of them are equal."""
    measurements: list[Measurement]
    switch_seconds: float = 0.0
    """Median of the additional seconds of the first step after a change of mode."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Notes for people on how it was made."""

    def difference(self, key: Key) -> str | None:
        """The first condition in which `key` differs from this profile's, in words; None if there is none."""
        for name in dict.fromkeys([*key, *self.key]):
            if self.key.get(name) != key.get(name):
                return f"{name} is {_short(self.key.get(name))} there and {_short(key.get(name))} here"
        return None

    def save(self, path: Path) -> None:
        """Write it atomically. Raises `ConfigError`."""
        steps = [[list(mode), list(shape), seconds] for mode, shape, seconds in self.measurements]
        record = {
            "format": FORMAT,
            "key": self.key,
            "notes": self.notes,
            "switch_seconds": self.switch_seconds,
            "steps": steps,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(record) + "\n")
        except OSError as error:
            raise ConfigError(f"the profile {str(path)!r} cannot be written: {first_line(error)}") from error

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile. Raises `ConfigError` if it is missing or invalid."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise ValueError(f"it has format {record['format']}, not {FORMAT}")
            steps = [
                Measurement(Mode(*mode), StepShape(*map(int, shape)), float(seconds))
                for mode, shape, seconds in record["steps"]
            ]
            return cls(dict(record["key"]), steps, float(record["switch_seconds"]), dict(record["notes"]))
        except FileNotFoundError:
            raise ConfigError(
                f"the profile {str(path)!r} does not exist; write it with ulysses-infer calibrate --output, or set "
                "policy.profile=auto"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{str(path)!r} is not a profile of step times: {first_line(error)}; write one with "
                "ulysses-infer calibrate --output"
            ) from error


def cached_path(key: Key) -> Path:
    """Where the profile of a model, its modes and a device is cached."""
    identity = json.dumps([key[name] for name in IDENTITY], sort_keys=True)
    return cache_folder("profiles") / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.json"


def read_profile(setting: str, key: Key) -> tuple[Profile | None, str]:
    """The profile of `policy.profile` (auto or a path); (None, why) if the cache has no valid one.

    Raises `ConfigError` for a path whose profile is missing, broken or measured under other conditions.
    """
    if setting != "auto":
        profile = Profile.load(Path(setting))
        difference = profile.difference(key)
        if difference is not None:
            raise ConfigError(
                f"policy.profile {setting!r} does not hold here: {difference}; calibrate again, or set it to auto"
            )
        return profile, f"read from {setting}"
    path = cached_path(key)
    if not path.is_file():
        return None, "no step times are stored for this model, layout and device"
    try:
        profile = Profile.load(path)
    except ConfigError as error:  # truncated, or of another version: it is only a cache
        return None, str(error)
    difference = profile.difference(key)
    if difference is not None:
        return None, f"the stored step times do not hold any more: {difference}"
    return profile, "read from the cache"


def _short(value: Any) -> str:
    text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        text = " ".join(map(str, value))
    return text if len(text) <= 120 else f"{text[:119]}…"
