"""Selects the tool-call format of a model, by name or from its chat template."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from ulysses_infer.errors import ConfigError
from ulysses_infer.server.tool_calls.events import ToolFormat
from ulysses_infer.server.tool_calls.json_calls import DEEPSEEK, HERMES, LLAMA3_JSON, MISTRAL
from ulysses_infer.server.tool_calls.pythonic import PythonicFormat
from ulysses_infer.server.tool_calls.qwen3_coder import Qwen3CoderFormat

F = TypeVar("F")
_ALL: tuple[ToolFormat, ...] = (HERMES, LLAMA3_JSON, MISTRAL, PythonicFormat(), Qwen3CoderFormat(), DEEPSEEK)
FORMATS: dict[str, ToolFormat] = {known.name: known for known in _ALL}

# markers in chat templates that describe the format; the first match counts
_SIGNS: tuple[tuple[str, str], ...] = (
    ("deepseek", r"<\uff5ctool▁calls?▁begin\uff5c>"),
    ("qwen3_coder", r"(?s)(?=.*<function=)(?=.*<parameter=)"),
    ("mistral", r"\[TOOL_CALLS\]"),
    ("pythonic", r"\[\w+\(\w+\s*=\s*\w+"),
    ("hermes", r"(?s)(?=.*<tool_call>)(?=.*\barguments\b)(?!.*<arg_key>)"),  # <arg_key> marks GLM's format
    (
        "llama3_json",
        r"(?s)(?=.*\bname\b)(?=.*\bparameters\b)(?=.*<\|(?:python_tag|eom_id|eot_id|eot)\|>)(?=.*\btools\b)",
    ),
)


def choose_format(name: str, chat_template: str | None) -> ToolFormat | None:
    """The format called `name`. "auto" detects it from the chat template; "none" is no format.

    None: outputs are plain content. Raises ConfigError for an unknown name, with the nearest one.
    """
    return choose("server.tool_call_parser", name, FORMATS, _SIGNS, chat_template)


def choose(
    setting: str, name: str, formats: Mapping[str, F], signs: Sequence[tuple[str, str]], chat_template: str | None
) -> F | None:
    """The format that `setting` names, or the one whose sign, a regex, the chat template has first.

    Raises ConfigError for an unknown name, with the nearest one.
    """
    if name == "none":
        return None
    if name == "auto":
        found = next((known for known, sign in signs if re.search(sign, chat_template or "")), None)
        return None if found is None else formats[found]
    if name not in formats:
        known = ["auto", "none", *formats]
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"use one of {', '.join(known)}"
        raise ConfigError(f"{setting} {name!r} is unknown; {hint}")
    return formats[name]
