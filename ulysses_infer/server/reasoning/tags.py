"""Reasoning between two tags, such as `<think>` and `</think>`."""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_infer.server.reasoning.events import ReasoningDelta
from ulysses_infer.server.reasoning.states import StateParser
from ulysses_infer.server.tool_calls.events import ContentDelta
from ulysses_infer.server.tool_calls.pieces import SPACE_OR_LINES, Piece, Tag, some, until
from ulysses_infer.server.tool_calls.streaming import num_shared


@dataclass(frozen=True)
class TaggedReasoning:
    """Models that write `opener`, their reasoning, `closer`, and then the content."""

    name: str
    opener: str = "<think>"
    closer: str = "</think>"
    starts_open: bool = False
    """Whether an output without `opener` begins with reasoning even if the prompt does not say so."""
    history_key: str = "reasoning_content"

    @property
    def tags(self) -> tuple[str, ...]:
        """Both tags."""
        return (self.opener, self.closer)

    def parser(self, prompt: str) -> TaggedParser:
        """A new parser, for one output."""
        return TaggedParser(self, *self._start(prompt))

    def prefix(self, prompt: str, tag: Tag) -> list[Piece]:
        """The reasoning, required if the prompt began it and optional if it did not."""
        is_open, may_open = self._start(prompt)
        thought = [*until(tag, self.closer), SPACE_OR_LINES]
        if is_open:
            return [some([tag(self.opener)], 0), *thought] if may_open else thought
        return [some([[*tag(self.opener), *thought]], 0)] if may_open else []

    def _start(self, prompt: str) -> tuple[bool, bool]:
        """Whether an output begins within reasoning, and whether it may still write `opener`."""
        text = prompt.rstrip()
        if text.endswith(self.opener):
            return True, False
        if text.endswith(self.closer):
            return False, False
        return self.starts_open, True


class TaggedParser(StateParser):
    """Reads one output. White space next to the tags belongs to them."""

    def __init__(self, markup: TaggedReasoning, is_open: bool, may_open: bool) -> None:
        super().__init__(self._start if may_open else self._after_tag)
        self._markup, self._is_open = markup, is_open
        self._space = ""  # at the end of the reasoning so far: part of it only if more follows

    @property
    def is_reasoning(self) -> bool:
        """Whether the text so far ends within reasoning."""
        return self._is_open

    # -- states: True if there is more to do -------------------------------------------------------------------------

    def _start(self) -> bool:
        """Nothing but white space was read."""
        text, opener = self._text.lstrip(), self._markup.opener
        if not self._is_final and opener.startswith(text) and text != opener:
            return False
        if text.startswith(opener):
            self._text, self._is_open = text[len(opener) :], True
            self._state = self._after_tag
        else:
            self._state = self._after_tag if self._is_open else self._content
        return True

    def _after_tag(self) -> bool:
        """Drop white space after a tag, or after the prompt."""
        self._text = self._text.lstrip()
        if not self._text:
            return False
        self._state = self._reasoning if self._is_open else self._content
        return True

    def _reasoning(self) -> bool:
        closer = self._markup.closer
        position = self._text.find(closer)
        if position >= 0:
            self._emit_reasoning(position)
            self._text, self._space, self._is_open = self._text[len(closer) :], "", False
            self._state = self._after_tag
            return True
        self._emit_reasoning(len(self._text) - (0 if self._is_final else num_shared(self._text, closer)))
        return False

    def _content(self) -> bool:
        if self._text:
            self._events.append(ContentDelta(self._text))
        self._text = ""
        return False

    def _emit_reasoning(self, length: int) -> None:
        taken, self._text = self._space + self._text[:length], self._text[length:]
        shown = taken.rstrip()
        self._space = taken[len(shown) :]
        if shown:
            self._events.append(ReasoningDelta(shown))
