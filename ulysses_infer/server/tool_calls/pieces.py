"""Pieces of grammars (`text/structured_pieces.py`), as formats of tool calls and reasoning write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Piece = dict[str, Any]
Tag = Callable[[str], list[Piece]]
"""The pieces of a tag: text, or a special token."""
LINES: Piece = {"regex": r"[ \n]{0,2}"}
SPACE: Piece = {"regex": " {0,1}"}
SPACE_OR_LINES: Piece = {"regex": r"\s{0,4}"}


def tag_writer(special: Mapping[str, list[int]]) -> Tag:
    """Writes tags. special: the special tokens among them, with their ids."""

    def tag(text: str) -> list[Piece]:
        return [{"tokens": special[text]}] if text in special else [text_piece(text)]

    return tag


def text_piece(text: str) -> Piece:
    """This text."""
    return {"text": text}


def some(alternatives: Sequence[list[Piece]], low: int = 1, high: int | None = 1) -> Piece:
    """One of the alternatives, `low` to `high` times."""
    return {"repeat": list(alternatives), "min": low, "max": high}


def until(tag: Tag, end: str) -> list[Piece]:
    """Any text up to a tag, and the tag."""
    closing = tag(end)
    return [{"until": end}] if "text" in closing[0] else [{"regex": "(?s:.*)"}, *closing]
