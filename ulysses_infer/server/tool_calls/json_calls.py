"""Tool-call formats whose arguments are a JSON object, streamed while the model writes it.

Sources: the chat templates of Qwen 2.5 and Hermes 2 Pro, of Llama 3.1, of Mistral's v3 to v13 tokenizers and of
DeepSeek V3 and V3.1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import regex

from ulysses_infer.server.tool_calls.definitions import names_of
from ulysses_infer.server.tool_calls.events import ToolCallParser, Tools
from ulysses_infer.server.tool_calls.streaming import (
    NAME,
    SPACE,
    BracketScanner,
    StreamingParser,
    as_json,
    call_id,
    short_call_id,
)

# An object up to its arguments, in the order that all templates use. Other orders are parsed once complete.
_KEYS = rf'"name"{SPACE}:{SPACE}"(?P<name>{NAME})"{SPACE},{SPACE}"(?:arguments|parameters)"{SPACE}:{SPACE}'
_ARGUMENTS = rf'(?P<arguments>\{{){SPACE}["}}]'
NAMED_OBJECT = rf"(?P<object>\{{){SPACE}{_KEYS}{_ARGUMENTS}"
# After the arguments inside such an object; some models add an id.
_REST = regex.compile(rf'{SPACE}(?:,{SPACE}"\w{{1,32}}"{SPACE}:{SPACE}"[^"]{{0,128}}"{SPACE})?\}}')


@dataclass(frozen=True)
class JsonFormat:
    """A format described by patterns. Each call starts with a match that ends where the arguments start."""

    name: str
    first: str
    """The first call, including its opener."""
    openers: tuple[str, ...] = ()
    """Texts that may start a call."""
    following: str | None = None
    """Another call directly after the previous one, if it needs no opener."""
    closing: str | None = None
    """Markup after a call."""
    is_bare: bool = False
    """Whether an output may start with a call without an opener; then only names of known tools make a call."""
    knows_names: bool = False
    """Whether names are not checked."""
    tags: tuple[str, ...] = ()
    """Markup that may be special tokens of a tokenizer."""
    make_id: Callable[[], str] = call_id
    patterns: dict[str, regex.Pattern[str]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Compile the patterns."""
        for kind, pattern in (("first", self.first), ("following", self.following), ("closing", self.closing)):
            if pattern is not None:
                self.patterns[kind] = regex.compile(pattern)

    def parser(self, tools: Tools) -> ToolCallParser:
        """A new parser, for one output."""
        checks = self.is_bare and not self.knows_names
        return JsonCallParser(self, frozenset(names_of(tools)) if checks else None)


class JsonCallParser(StreamingParser):
    """Parses a `JsonFormat`. `known_names`: the names a call may have; None for any."""

    def __init__(self, markup: JsonFormat, known_names: frozenset[str] | None) -> None:
        super().__init__(markup.openers, markup.make_id)
        self._markup, self._known_names = markup, known_names
        self._pattern = markup.patterns["first"]
        self._scanner = BracketScanner()
        self._num_scanned = 0
        self._in_object = False
        if markup.is_bare:
            self._state = self._begin

    def _num_held(self) -> int:
        return super()._num_held() if self._openers else 0

    # -- states ----------------------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """The output may start with a call."""
        stripped = self._text.lstrip()
        self._space += self._take(len(self._text) - len(stripped))
        if not stripped:
            if self._is_final:
                self._state = self._content
            return self._is_final
        self._state = self._open
        return True

    def _open(self) -> bool:
        """The text starts with the first call of a group, if it is a call."""
        self._pattern = self._markup.patterns["first"]
        self._state = self._head
        return True

    def _head(self) -> bool:
        """Everything before the arguments."""
        found, may_come = self._match(self._pattern)
        if found is not None:
            return self._commit(found)
        if may_come:
            return False
        if self._drop_unfinished(self._pattern):
            return True
        self._scanner, self._num_scanned = BracketScanner(), 0
        self._state = self._whole
        return True

    def _commit(self, found: regex.Match[str]) -> bool:
        if self._known_names is not None and found["name"] not in self._known_names:
            return self._no_call()
        self._start_call(found["name"], found.groupdict().get("id"))
        self._in_object = bool(found.groupdict().get("object"))
        self._take(found.start("arguments"))
        self._scanner = BracketScanner()
        self._state = self._arguments
        return True

    def _whole(self) -> bool:
        """An object whose keys have another order, or whose arguments are text: parsed once complete."""
        start = self._text.find("{")
        if start < 0 or not self._is_prefix(self._text[:start]):
            return self._no_call()
        end = self._scanner.feed(self._text[max(start, self._num_scanned) :])
        if end is None:
            self._num_scanned = len(self._text)
            if not self._is_final:
                return False
            return self._drop_rest() if self._is_call_likely() else self._no_call()
        end += max(start, self._num_scanned)
        call = _read_call(self._text[start:end], self._known_names)
        if call is None:
            return self._no_call()
        self._take(end)
        self._start_call(call[0])
        self._emit_arguments(call[1])
        self._state = self._after
        return True

    def _is_prefix(self, text: str) -> bool:
        """Whether `text` may precede a call's object."""
        found = self._pattern.match(text + "{", partial=True)
        return found is not None and found.partial

    def _no_call(self) -> bool:
        if self._pattern is self._markup.patterns["first"]:
            return self._reject()
        self._state = self._close
        return True

    def _arguments(self) -> bool:
        end = self._scanner.feed(self._text)
        self._emit_arguments(self._take(len(self._text) if end is None else end))
        if end is None:
            return False
        self._state = self._rest if self._in_object else self._after
        return True

    def _rest(self) -> bool:
        """The end of the object that contains the arguments. The call is valid without it."""
        found, may_come = self._match(_REST)
        if may_come:
            return False
        if found is None and self._drop_unfinished(_REST):
            return True
        if found is not None:
            self._take(found.end())
        self._state = self._after
        return True

    def _after(self) -> bool:
        """Another call without an opener, or the end of the group."""
        if "following" not in self._markup.patterns:
            self._state = self._close
            return True
        self._pattern = self._markup.patterns["following"]
        self._state = self._head
        return True

    def _close(self) -> bool:
        if "closing" in self._markup.patterns:
            closing = self._markup.patterns["closing"]
            found, may_come = self._match(closing)
            if may_come:
                return False
            if found is None and self._drop_unfinished(closing):
                return True
            if found is not None:
                self._take(found.end())
                return True
        self._state = self._content
        return True


def _read_call(text: str, known_names: frozenset[str] | None) -> tuple[str, str] | None:
    """Name and arguments, as JSON, of a complete object; None if it is not a call."""
    try:
        call = json.loads(text)
        name = call.get("name")
        arguments = call.get("arguments", call.get("parameters", None if known_names is not None else {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        written = as_json(arguments)
    except (ValueError, RecursionError):
        return None
    is_call = isinstance(name, str) and bool(regex.fullmatch(NAME, name)) and isinstance(arguments, dict)
    if not is_call or (known_names is not None and name not in known_names):
        return None
    return name, written


HERMES = JsonFormat(
    "hermes",
    first=rf"<tool_call>{SPACE}{NAMED_OBJECT}",
    openers=("<tool_call>",),
    closing=rf"{SPACE}</tool_call>",
    tags=("<tool_call>", "</tool_call>"),
)
LLAMA3_JSON = JsonFormat(
    "llama3_json",
    first=rf"(?:<\|python_tag\|>)?{SPACE}{NAMED_OBJECT}",
    openers=("<|python_tag|>",),
    following=rf"{SPACE};{SPACE}{NAMED_OBJECT}",
    is_bare=True,
    tags=("<|python_tag|>",),
)
MISTRAL = JsonFormat(
    "mistral",
    first=(
        rf"\[TOOL_CALLS\]{SPACE}(?:\[{SPACE}{NAMED_OBJECT}"
        rf"|(?P<name>{NAME})(?:\[CALL_ID\](?P<id>\w{{1,64}}))?(?:\[ARGS\])?{SPACE}{_ARGUMENTS})"
    ),
    openers=("[TOOL_CALLS]",),
    following=rf"{SPACE},{SPACE}{NAMED_OBJECT}",
    closing=rf"{SPACE}\]",
    tags=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    make_id=short_call_id,
)
DEEPSEEK_TAGS = tuple(
    f"<\uff5ctool▁{word}\uff5c>" for word in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
)
_CALLS, _CALL, _SEPARATOR = DEEPSEEK_TAGS[:3]
DEEPSEEK = JsonFormat(
    "deepseek",
    first=(
        rf"(?:{_CALLS}{SPACE})?{_CALL}{SPACE}"
        rf"(?:function{_SEPARATOR}(?P<name>{NAME}){SPACE}```json{SPACE}"
        rf"|(?P<name>{NAME}){_SEPARATOR}{SPACE}){_ARGUMENTS}"
    ),
    openers=(_CALLS, _CALL),
    closing=rf"{SPACE}(?:```{SPACE})?<\uff5ctool▁calls?▁end\uff5c>",
    tags=DEEPSEEK_TAGS,
)
REQUIRED = JsonFormat(
    "required",
    first=rf"\[{SPACE}{NAMED_OBJECT}",
    following=rf"{SPACE},{SPACE}{NAMED_OBJECT}",
    closing=rf"{SPACE}\]",
    is_bare=True,
    knows_names=True,
)
"""The format that `tool_choice_constraint` forces for "required"."""
