"""Selects the tool-call format of a model, by name or from its chat template."""

from __future__ import annotations

import difflib
import re

from ulysses_infer.errors import ConfigError
from ulysses_infer.server.tool_calls.events import ToolFormat
from ulysses_infer.server.tool_calls.json_calls import DEEPSEEK, HERMES, LLAMA3_JSON, MISTRAL
from ulysses_infer.server.tool_calls.pythonic import PythonicFormat
from ulysses_infer.server.tool_calls.qwen3_coder import Qwen3CoderFormat

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
    if name == "none":
        return None
    if name == "auto":
        return _recognise(chat_template or "")
    if name not in FORMATS:
        known = ["auto", "none", *FORMATS]
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"use one of {', '.join(known)}"
        raise ConfigError(f"server.tool_call_parser {name!r} is unknown; {hint}")
    return FORMATS[name]


def _recognise(chat_template: str) -> ToolFormat | None:
    found = next((name for name, sign in _SIGNS if re.search(sign, chat_template)), None)
    return None if found is None else FORMATS[found]
