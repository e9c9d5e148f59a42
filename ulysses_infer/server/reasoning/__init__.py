"""Reasoning: separates what a model thinks from what it answers.

`choose_reasoning` detects the format in which a model writes its reasoning. The format's parser splits the streamed
text of an output into reasoning and content; `prefix` lets a constraint on the output apply to the content alone.
"""

from ulysses_infer.server.reasoning.choosing import FORMATS, choose_reasoning
from ulysses_infer.server.reasoning.events import ReasoningDelta, ReasoningEvent, ReasoningFormat, ReasoningParser

__all__ = [
    "FORMATS",
    "ReasoningDelta",
    "ReasoningEvent",
    "ReasoningFormat",
    "ReasoningParser",
    "choose_reasoning",
]
