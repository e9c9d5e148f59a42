"""Descriptions of policies in words."""

from __future__ import annotations

from typing import Any


def describe_settings(policy: dict[str, Any]) -> str:
    """Its settings without its name: `threshold_tokens=256 base=[2, 1] shift=[1, 2]`."""
    return " ".join(f"{key}={value}" for key, value in policy.items() if key != "name")


def mode_kind(sp: int, tp: int) -> str:
    """The kind of a mode, which sets its colour: "sp", "tp" or "mixed". As `console.screen.mode_style`."""
    if sp > 1:
        return "sp" if tp == 1 else "mixed"
    return "tp"
