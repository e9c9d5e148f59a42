"""One request of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Item:
    """The prompt and output length of one request."""

    content: str | list[int] | list[dict[str, Any]]
    """Text, token ids, or messages."""
    output_len: int
    """Maximum number of tokens to generate."""
    at: float | None = None
    """Seconds from the start; None if the dataset has no times."""
