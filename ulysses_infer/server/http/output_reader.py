"""Reads the text of one output: reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ulysses_infer.server.http.outputs import Delta
from ulysses_infer.server.reasoning import ReasoningDelta, ReasoningEvent, ReasoningParser
from ulysses_infer.server.tool_calls import ArgumentsDelta, CallStarted, ContentDelta, SpecialTags, ToolCallParser

OutputEvent = ReasoningEvent
"""ReasoningDelta, ContentDelta, CallStarted or ArgumentsDelta."""


class OutputReader:
    """Turns what is new in an output into events, whichever parsers the output needs.

    calls: whether tool calls are allowed; is_parallel: whether more than one is.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None = None,
        tools: ToolCallParser | None = None,
        special: SpecialTags | None = None,
        calls: bool = False,
        is_parallel: bool = True,
    ) -> None:
        self._reasoning, self._tools = reasoning, tools
        self._allows_calls, self._is_parallel = calls, is_parallel
        self._before_parsers = None if special is None else special.before_parser()
        self._in_content = None if special is None else special.in_content()
        self._in_reasoning = None if special is None else special.in_content()
        self._num_tokens = 0
        self.has_calls = False
        """Whether the output calls a tool."""
        self.num_reasoning_tokens = None if reasoning is None else 0
        """How many of its tokens are reasoning; None if it is not parsed for it."""

    def read(self, delta: Delta) -> list[OutputEvent]:
        """The new events; neighbours of one kind are joined."""
        events: list[OutputEvent] = []
        for text, num_tokens in delta.pieces if self._reasoning is not None else [(delta.text, 0)]:
            events += self._push(text)
            self._count(num_tokens)
        if delta.finish_reason is not None:
            events += self._finish(is_cut=delta.finish_reason == "length")
        return _joined(events)

    def _count(self, num_tokens: int) -> None:
        """Add the tokens since the last piece of text, if the output is now within reasoning."""
        if self._reasoning is not None and self.num_reasoning_tokens is not None and self._reasoning.is_reasoning:
            self.num_reasoning_tokens += num_tokens - self._num_tokens
        self._num_tokens = num_tokens

    def _push(self, text: str) -> Iterator[OutputEvent]:
        if self._before_parsers is not None:
            text = self._before_parsers.feed(text, False)
        if text:
            yield from self._parse([ContentDelta(text)] if self._reasoning is None else self._reasoning.push(text))

    def _finish(self, is_cut: bool) -> Iterator[OutputEvent]:
        """The text that was held back."""
        if self._before_parsers is not None:
            text = self._before_parsers.feed("", True)
            yield from self._parse([ContentDelta(text)] if self._reasoning is None else self._reasoning.push(text))
        if self._reasoning is not None:
            yield from self._parse(self._reasoning.finish())
        if self._tools is not None:
            yield from self._shown(self._tools.finish(is_cut))
        for remover, kind in ((self._in_reasoning, ReasoningDelta), (self._in_content, ContentDelta)):
            if remover is not None:
                yield kind(remover.feed("", True))

    def _parse(self, events: Iterable[ReasoningEvent]) -> Iterator[OutputEvent]:
        """Parse content for tool calls."""
        for event in events:
            if isinstance(event, ContentDelta) and self._tools is not None:
                yield from self._shown(self._tools.push(event.text))
            else:
                yield from self._shown([event])

    def _shown(self, events: Iterable[OutputEvent]) -> Iterator[OutputEvent]:
        """What the client gets: no special tokens, and only calls that are allowed."""
        for event in events:
            match event:
                case ReasoningDelta(text):
                    yield ReasoningDelta(text if self._in_reasoning is None else self._in_reasoning.feed(text, False))
                case ContentDelta(text):
                    yield ContentDelta(text if self._in_content is None else self._in_content.feed(text, False))
                case CallStarted() | ArgumentsDelta() if self._allows_calls:
                    if self._is_parallel or event.index == 0:
                        self.has_calls = True
                        yield event
                case ArgumentsDelta(_, text):  # the model called although the request has no tools
                    yield ContentDelta(text)


def _joined(events: Iterable[OutputEvent]) -> list[OutputEvent]:
    joined: list[OutputEvent] = []
    for event in events:
        last = joined[-1] if joined else None
        match last, event:
            case (ReasoningDelta(start), ReasoningDelta(text)):
                joined[-1] = ReasoningDelta(start + text)
            case (ContentDelta(start), ContentDelta(text)):
                joined[-1] = ContentDelta(start + text)
            case (ArgumentsDelta(index, start), ArgumentsDelta(same, text)) if index == same:
                joined[-1] = ArgumentsDelta(index, start + text)
            case _ if isinstance(event, CallStarted) or event.text:
                joined.append(event)
    return joined
