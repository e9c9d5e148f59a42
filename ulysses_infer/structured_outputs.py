"""`StructuredOutputs`: what the text of an output must match, with vLLM's names; every value is checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ulysses_infer.errors import RequestError
from ulysses_infer.request_values import distinct_strings, shown, unknown_key

MAX_WHITESPACE_PATTERN = 64
MAX_GRAMMAR_CHARACTERS = 2**17  # of a schema, regex or grammar: larger ones take seconds to compile
STRUCTURED_KINDS = ("json", "regex", "choice", "grammar", "json_object", "alternatives")


@dataclass(kw_only=True, frozen=True)
class StructuredOutputs:
    """What an output's text must match: exactly one of the fields from `json` to `json_object` (vLLM's names).

    Any wrong value raises `RequestError` at construction. Whether a schema, regex or grammar compiles is known
    later, where the library for it is: `text/structured.py`.
    """

    json: str | dict[str, Any] | None = None  # a JSON schema; becomes its text
    regex: str | None = None  # the whole output matches it
    choice: list[str] | None = None  # the output is one of these
    grammar: str | None = None  # context-free, as Lark writes it, or GBNF
    json_object: bool = False  # any JSON object
    alternatives: str | list[Any] | None = None  # sequences of text, tokens and JSON: text/structured_pieces.py
    disable_any_whitespace: bool = False  # JSON without a space or line break outside its strings
    whitespace_pattern: str | None = None  # regex of the white space between two parts of JSON; None: bounded

    def __post_init__(self) -> None:
        """Normalise and check every field. Raises RequestError."""
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"structured_outputs.{name} must be true or false, got {shown(getattr(self, name))}")
        object.__setattr__(self, "json", _schema_text(self.json))
        object.__setattr__(self, "alternatives", _json_text(self.alternatives))
        self._check_whitespace()
        if self.choice is not None:
            object.__setattr__(self, "choice", distinct_strings("structured_outputs.choice", self.choice))
        given = [name for name in STRUCTURED_KINDS if getattr(self, name) not in (None, False, [])]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {' and '.join(given) or 'nothing to match'}; "
                f"use exactly one of {', '.join(STRUCTURED_KINDS)}"
            )
        self._check_text(given[0])

    def _check_whitespace(self) -> None:
        pattern = self.whitespace_pattern
        if pattern is None:
            return
        if not isinstance(pattern, str) or len(pattern) > MAX_WHITESPACE_PATTERN:
            raise RequestError(f"structured_outputs.whitespace_pattern must be a short regex, got {shown(pattern)}")
        if self.disable_any_whitespace:
            raise RequestError("structured_outputs has disable_any_whitespace and whitespace_pattern; use one of them")

    def _check_text(self, kind: str) -> None:
        value = "\n".join(self.choice or ()) if kind == "choice" else getattr(self, kind)
        if kind == "json_object":
            return
        if not isinstance(value, str) or not value:
            raise RequestError(f"structured_outputs.{kind} must be text, got {shown(value)}; use a string")
        if len(value) > MAX_GRAMMAR_CHARACTERS:
            raise RequestError(
                f"structured_outputs.{kind} has {len(value)} characters; use at most {MAX_GRAMMAR_CHARACTERS}"
            )
        if value.encode(errors="ignore").decode() != value:
            raise RequestError(f"structured_outputs.{kind} has half a surrogate pair, which no text has; remove it")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> StructuredOutputs:
        """Build from a JSON mapping; None means not given. Raises RequestError for an unknown key."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in mapping:
            if key not in known:
                raise RequestError(f"structured_outputs: {unknown_key(key, known, 'key')}")
        return cls(**{key: value for key, value in mapping.items() if value is not None})

    def to_mapping(self) -> dict[str, Any]:
        """What `from_mapping` makes an equal object of: plain values, only what is not the default."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }


def _schema_text(schema: Any) -> Any:
    """A schema given as a mapping, in JSON; anything else as it is."""
    if not isinstance(schema, Mapping):
        return schema
    try:
        return json.dumps(dict(schema), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"structured_outputs.json is not a JSON schema ({str(error)[:80]}); use plain JSON values"
        ) from error


def _json_text(value: Any) -> Any:
    """A list in JSON; anything else as it is."""
    return _schema_text({"": value})[4:-1] if isinstance(value, list) else value
