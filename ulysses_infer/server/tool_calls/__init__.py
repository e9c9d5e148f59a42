"""Tool calls: parses them from model output, and constrains outputs to them.

`choose_format` tells how a model writes calls; the format's parser turns an output's text, as it streams, into content
and calls. `tool_choice_constraint` and `constrained_format` do the same for a `tool_choice` that leaves no choice.
"""

from ulysses_infer.server.tool_calls.choosing import FORMATS, choose_format
from ulysses_infer.server.tool_calls.constraint import constrained_format, tool_choice_constraint
from ulysses_infer.server.tool_calls.definitions import ToolChoice, check_tool_choice, check_tools
from ulysses_infer.server.tool_calls.events import (
    ArgumentsDelta,
    CallStarted,
    ContentDelta,
    ToolCallParser,
    ToolEvent,
    ToolFormat,
    Tools,
)

__all__ = [
    "FORMATS",
    "ArgumentsDelta",
    "CallStarted",
    "ContentDelta",
    "ToolCallParser",
    "ToolChoice",
    "ToolEvent",
    "ToolFormat",
    "Tools",
    "check_tool_choice",
    "check_tools",
    "choose_format",
    "constrained_format",
    "tool_choice_constraint",
]
