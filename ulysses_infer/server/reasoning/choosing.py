"""Selects the reasoning format of a model, by name or from its chat template."""

from __future__ import annotations

from ulysses_infer.server.reasoning.events import ReasoningFormat
from ulysses_infer.server.reasoning.harmony import Harmony
from ulysses_infer.server.reasoning.tags import TaggedReasoning
from ulysses_infer.server.tool_calls.choosing import choose

_ALL: tuple[ReasoningFormat, ...] = (
    TaggedReasoning("deepseek_r1", starts_open=True),
    TaggedReasoning("qwen3"),
    TaggedReasoning("glm45"),
    TaggedReasoning("mistral", "[THINK]", "[/THINK]"),
    Harmony(),
)
FORMATS: dict[str, ReasoningFormat] = {known.name: known for known in _ALL}

# markers in chat templates that describe the format; the first match counts
_SIGNS: tuple[tuple[str, str], ...] = (
    ("openai_gptoss", r"<\|channel\|>analysis"),
    ("mistral", r"\[THINK\]"),
    ("glm45", r"(?s)(?=.*\[gMASK\])(?=.*</think>)"),
    ("qwen3", r"</think>"),
)


def choose_reasoning(name: str, chat_template: str | None) -> ReasoningFormat | None:
    """The format called `name`. "auto" detects it from the chat template; "none" is no format.

    None: outputs are not parsed for reasoning. Raises ConfigError for an unknown name, with the nearest one.
    """
    return choose("server.reasoning_parser", name, FORMATS, _SIGNS, chat_template)
