"""Tool calls: parses them from model output, and constrains outputs to them.

`choose_format` detects the format in which a model writes calls. The format's parser splits the streamed text of an
output into content and calls. `tool_choice_constraint` and `constrained_format` do the same for a `tool_choice` that
forces a call.
"""

from ulysses_infer.server.tool_calls.choosing import FORMATS, choose_format
from ulysses_infer.server.tool_calls.constraint import constrained_format, tool_choice_constraint
from ulysses_infer.server.tool_calls.definitions import ToolChoice, check_tool_choice, check_tools, named_function
from ulysses_infer.server.tool_calls.events import (
    ArgumentsDelta,
    CallStarted,
    ContentDelta,
    ToolCallParser,
    ToolEvent,
    ToolFormat,
    Tools,
)
from ulysses_infer.server.tool_calls.formatted import formatted_parser
from ulysses_infer.server.tool_calls.grammar import calls_grammar
from ulysses_infer.server.tool_calls.special import SpecialTags, special_tags

__all__ = [
    "FORMATS",
    "ArgumentsDelta",
    "CallStarted",
    "ContentDelta",
    "SpecialTags",
    "ToolCallParser",
    "ToolChoice",
    "ToolEvent",
    "ToolFormat",
    "Tools",
    "calls_grammar",
    "check_tool_choice",
    "check_tools",
    "choose_format",
    "constrained_format",
    "formatted_parser",
    "named_function",
    "special_tags",
    "tool_choice_constraint",
]
