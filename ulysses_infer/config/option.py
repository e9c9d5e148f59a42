"""How a key of the schema is declared: its default, description and allowed values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

MISSING = "???"
"""The default of a key that a recipe must set, as OmegaConf spells it."""


def option(
    default: Any = None,
    *,
    help: str,
    factory: Callable[[], Any] | None = None,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    kind: str | None = None,
    secret: bool = False,
) -> Any:
    """A recipe key: its default, description and allowed values, and whether its value is hidden in printed recipes.

    `kind` describes the type where the Python type is not specific enough.
    """
    metadata = {
        "help": help,
        "kind": kind,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "secret": secret,
    }
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)
