"""Base of streaming tool-call parsers: text in pieces, markup recognised before any of it is shown.

A parser is a state machine. A state looks at the text that was not taken yet and either takes some of it and names
the next state, or waits for more. It decides only what no further text can change, so that cuts make no difference.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Sequence
from typing import Any

import regex

from ulysses_infer.server.tool_calls.events import ArgumentsDelta, CallStarted, ContentDelta, ToolEvent

NAME = r"[^\s\p{Cs}\"\\<>\[\]{}()=]{1,128}"
SPACE = r"\s{0,256}+"  # bounds the text held back while it may still become a call
_ID_CHARACTERS = string.ascii_letters + string.digits


def call_id() -> str:
    """A call id in OpenAI's format."""
    return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """A call id as required by Mistral's chat templates: nine letters or digits."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))


class StreamingParser:
    """Passes content up to one of the `openers`; the subclass's state `_open` handles what follows."""

    def __init__(self, openers: Sequence[str], make_id: Callable[[], str] = call_id) -> None:
        self._openers, self._make_id = openers, make_id
        self._text = ""
        self._is_final = self._is_cut = False
        self._state: Callable[[], bool] = self._content
        self._space = ""  # white space around calls: content only if text follows or no call was made
        self._in_content = False
        self._num_calls = 0
        self._events: list[ToolEvent] = []

    def push(self, text: str) -> list[ToolEvent]:
        """Take the next piece of text; returns the new events."""
        self._text += text
        while self._state():
            pass
        events, self._events = self._events, []
        return events

    def finish(self, is_cut: bool = False) -> list[ToolEvent]:
        """The output is complete: returns the text held back. Of a cut output, not the start of a call."""
        self._is_final, self._is_cut = True, is_cut
        return self.push("")

    # -- states: True if there is more to do -----------------------------------------------------------------------

    def _content(self) -> bool:
        if not self._in_content:
            stripped = self._text.lstrip()
            self._space += self._text[: len(self._text) - len(stripped)]
            self._text = stripped
        position = min((at for opener in self._openers if (at := self._text.find(opener)) >= 0), default=None)
        if position is not None:
            self._take_content(position)
            self._state = self._open
            return True
        holds = not self._is_final or (self._is_cut and self._num_calls > 0)
        self._take_content(len(self._text) - (self._num_held() if holds else 0))
        if self._is_final and not self._num_calls:
            self._emit_content(self._space)
            self._space = ""
        return False

    def _open(self) -> bool:
        """The text starts with an opener."""
        raise NotImplementedError

    # -- helpers of the states -------------------------------------------------------------------------------------

    def _match(self, pattern: regex.Pattern[str]) -> tuple[regex.Match[str] | None, bool]:
        """The match at the start of the text, or whether more text could still make it match."""
        found = pattern.match(self._text, partial=True)
        if found is None or found.partial:
            return None, found is not None and not self._is_final
        return found, False

    def _drop_unfinished(self, pattern: regex.Pattern[str]) -> bool:
        """Drop the rest of an output that ends within what may be a call, if that is likely."""
        if not (self._is_final and self._text and self._is_call_likely()):
            return False
        found = pattern.match(self._text, partial=True)
        if found is None or not found.partial:
            return False
        return self._drop_rest()

    def _is_call_likely(self) -> bool:
        """Whether the output called before, or was cut after an opener."""
        return self._num_calls > 0 or (self._is_cut and any(map(self._text.startswith, self._openers)))

    def _drop_rest(self) -> bool:
        self._take(len(self._text))
        self._state = self._content
        return True

    def _reject(self) -> bool:
        """The text starts with an opener that does not start a call: it is content."""
        self._take_content(max((len(opener) for opener in self._openers if self._text.startswith(opener)), default=0))
        self._state = self._content
        return True

    def _leave_call(self, closer: regex.Pattern[str]) -> bool:
        """Return to content, after `closer` if that comes next. Like a state, returns False while `closer` may still
        come."""
        found, may_come = self._match(closer)
        if may_come:
            return False
        if found is None and self._drop_unfinished(closer):
            return True
        if found is not None:
            self._take(found.end())
        self._state = self._content
        return True

    def _start_call(self, name: str, identifier: str | None = None) -> None:
        self._events.append(CallStarted(self._num_calls, identifier or self._make_id(), name))
        self._num_calls += 1
        self._space, self._in_content = "", False

    def _emit_arguments(self, text: str) -> None:
        """Add to the arguments of the newest call."""
        if text:
            self._events.append(ArgumentsDelta(self._num_calls - 1, text))

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken

    def _take_content(self, length: int) -> None:
        """Take `length` characters as content."""
        if length > 0:
            self._emit_content(self._space + self._take(length))
            self._space, self._in_content = "", True

    def _emit_content(self, text: str) -> None:
        if text:
            self._events.append(ContentDelta(text))

    def _num_held(self) -> int:
        """Length of the longest suffix of the text that is a prefix of an opener."""
        return max(num_shared(self._text, opener) for opener in self._openers)


def as_json(value: Any) -> str:
    """Standard JSON. Raises ValueError for values that JSON lacks, such as infinities."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    has_half_pairs = any("\ud800" <= character <= "\udfff" for character in text)
    return json.dumps(value) if has_half_pairs else text


def num_shared(text: str, opener: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `opener`."""
    longest = min(len(text), len(opener) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(opener[:length])), 0)


class BracketScanner:
    """Finds the end of a bracketed value in streamed text. `quotes`: the characters that delimit strings."""

    def __init__(self, quotes: str = '"') -> None:
        self._quotes = quotes
        self._depth = 0
        self._quote = ""
        self._is_escaped = False

    def feed(self, text: str) -> int | None:
        """Take more text, which starts with the opening bracket. Returns how much of it belongs to the value, once it
        ends."""
        for position, character in enumerate(text):
            if self._quote:
                self._in_string(character)
            elif character in self._quotes:
                self._quote = character
            elif character in "{[(":
                self._depth += 1
            elif character in "}])":
                self._depth -= 1
                if self._depth == 0:
                    return position + 1
        return None

    def _in_string(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == self._quote:
            self._quote = ""
