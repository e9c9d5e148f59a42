"""Alternatives of text, tokens and JSON in one grammar: `StructuredOutputs.alternatives`.

The value is a list of alternatives, each a list of pieces. A piece is one of:

    {"text": "…"}                                   this text
    {"tokens": [7, 8]}                              one of these token ids, such as a special token
    {"regex": "…"}                                  text of this regex
    {"until": "…"}                                  any text up to this one, which is part of it
    {"json": {…}}                                   JSON of this schema
    {"repeat": [[…], …], "min": 0, "max": null}     one of the alternatives, min to max times; with "separator": […]
                                                    between two of them, at least once
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from ulysses_infer.errors import RequestError

MAX_DEPTH = 8
MAX_REPEATS = 64


def alternatives_lark(alternatives: Any, schema_text: Callable[[Any], str]) -> str:
    """The grammar in Lark. `schema_text` prepares the schemas. Raises RequestError."""
    writer = _Writer(schema_text)
    start = writer.alternatives(alternatives, 0)
    return "\n".join([f"start: {start}", *writer.rules])


def token_ids(alternatives: Any) -> Iterator[int]:
    """The token ids in checked alternatives."""
    for piece in (piece for pieces in alternatives for piece in pieces):
        yield from piece.get("tokens", ())
        yield from token_ids([*piece.get("repeat", ()), piece.get("separator", ())])


class _Writer:
    """Collects the rules that pieces need."""

    def __init__(self, schema_text: Callable[[Any], str]) -> None:
        self.rules: list[str] = []
        self._schema_text = schema_text
        self._schemas: dict[str, str] = {}

    def alternatives(self, alternatives: Any, depth: int) -> str:
        is_list = isinstance(alternatives, list) and all(isinstance(pieces, list) for pieces in alternatives)
        if not is_list or not alternatives or depth > MAX_DEPTH:
            raise _wrong(alternatives)
        return " | ".join(" ".join(self._piece(piece, depth) for piece in pieces) or '""' for pieces in alternatives)

    def _piece(self, piece: Any, depth: int) -> str:
        match piece:
            case {"text": str(text)} if text:
                return json.dumps(text, ensure_ascii=False)
            case {"tokens": [*ids]} if ids and all(type(token) is int and token >= 0 for token in ids):
                return f"<[{','.join(map(str, ids))}]>"
            case {"regex": str(pattern)} if pattern and "\n" not in pattern:
                return f"/{pattern.replace('/', chr(92) + '/')}/"
            case {"until": str(end)} if end:
                name = f"until_{len(self.rules)}"
                self.rules.append(f"{name}[stop={json.dumps(end, ensure_ascii=False)}]: /(?s:.*)/")
                return name
            case {"json": schema}:
                return self._schema(schema)
            case {"repeat": inner, "min": int(low), "max": int() | None as high} if 0 <= low <= MAX_REPEATS:
                return self._repeat(inner, piece.get("separator"), low, high, depth + 1)
        raise _wrong(piece)

    def _repeat(self, inner: Any, separator: Any, low: int, high: int | None, depth: int) -> str:
        item = f"({self.alternatives(inner, depth)})"
        if separator is None:
            return f"{item}{_times(low, high)}"
        name = f"item_{len(self.rules)}"
        self.rules.append(f"{name}: {item}")
        between = self.alternatives([separator], depth)
        return f"({name} ({between} {name}){_times(max(low - 1, 0), None if high is None else max(high - 1, 0))})"

    def _schema(self, schema: Any) -> str:
        text = self._schema_text(schema)
        if text not in self._schemas:
            self._schemas[text] = f"json_{len(self._schemas)}"
            self.rules.append(f"{self._schemas[text]}: %json {text}")
        return self._schemas[text]


def _times(low: int, high: int | None) -> str:
    if high is not None and not low <= high <= MAX_REPEATS:
        raise _wrong({"min": low, "max": high})
    return f"{{{low},{'' if high is None else high}}}"


def _wrong(value: Any) -> RequestError:
    return RequestError(f"structured_outputs.alternatives has {str(value)[:60]!r}; use lists of pieces")
