"""What parsers of reasoning share: text in pieces, read by one state after another."""

from __future__ import annotations

from collections.abc import Callable

from ulysses_infer.server.reasoning.events import ReasoningEvent


class StateParser:
    """Calls the current state until it needs more text. A state returns True if there is more to do."""

    def __init__(self, start: Callable[[], bool]) -> None:
        self._state = start
        self._text = ""
        self._is_final = False
        self._events: list[ReasoningEvent] = []

    def push(self, text: str) -> list[ReasoningEvent]:
        """Take the next piece of text; returns the new events."""
        self._text += text
        while self._state():
            pass
        events, self._events = self._events, []
        return events

    def finish(self) -> list[ReasoningEvent]:
        """The output is complete: returns the text held back."""
        self._is_final = True
        return self.push("")
