"""Outputs that are either calls or text of a response format."""

from __future__ import annotations

from ulysses_infer.server.tool_calls.events import ContentDelta, ToolCallParser, ToolEvent, ToolFormat, Tools


def formatted_parser(markup: ToolFormat, tools: Tools) -> ToolCallParser:
    """A parser for one output that is calls in `markup` or other text, but not both."""
    parser = markup.parser(tools)
    return parser if markup.is_bare else FormattedParser(parser, markup.tags)


class FormattedParser:
    """Reads calls only if the output begins with a tag: text of a response format may contain tags."""

    def __init__(self, parser: ToolCallParser, tags: tuple[str, ...]) -> None:
        self._parser, self._tags = parser, tags
        self._held = ""
        self._is_call: bool | None = None

    def push(self, text: str) -> list[ToolEvent]:
        """Take the next piece of text; returns the new events."""
        if self._is_call is None:
            text, self._held = self._held + text, ""
            start = text.lstrip()
            if any(start.startswith(tag) for tag in self._tags):
                self._is_call = True
            elif any(tag.startswith(start) for tag in self._tags):
                self._held = text
                return []
            else:
                self._is_call = False
        if self._is_call:
            return self._parser.push(text)
        return [ContentDelta(text)] if text else []

    def finish(self, is_cut: bool = False) -> list[ToolEvent]:
        """The output is complete: returns the text held back."""
        if self._is_call:
            return self._parser.finish(is_cut)
        return [ContentDelta(self._held)] if self._held else []
