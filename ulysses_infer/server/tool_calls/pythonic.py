"""Tool calls as a Python list, `[f(a=1), g(b="x")]` (Llama 3.2 and 4).

Values are Python literals, so that a call is given out when it is complete, not before. The list begins the output, or
stands in Llama 4's `<|python_start|>…<|python_end|>`. Only known names make a call: lists are common in plain text.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

import regex

from ulysses_infer.server.tool_calls.definitions import names_of
from ulysses_infer.server.tool_calls.events import ToolCallParser, Tools
from ulysses_infer.server.tool_calls.streaming import SPACE, BracketScanner, StreamingParser, as_json

MAX_CALL_CHARACTERS = 2**17
MAX_DEPTH = 64
_OPENER = "<|python_start|>"
_NAME = r"(?P<name>[A-Za-z_][\w.-]{0,127})"
_FIRST = regex.compile(rf"(?:<\|python_start\|>)?{SPACE}\[{SPACE}{_NAME}{SPACE}\(")
_NEXT = regex.compile(rf"{SPACE},{SPACE}{_NAME}{SPACE}\(")
_END = regex.compile(rf"{SPACE},?{SPACE}\]")
_CLOSE = regex.compile(rf"{SPACE}<\|python_end\|>")
_JSON_NAMES: dict[str, Any] = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class PythonicFormat:
    """Lists of Python calls."""

    name: str = "pythonic"
    tags: tuple[str, ...] = ("<|python_start|>", "<|python_end|>")
    is_bare: bool = True

    def parser(self, tools: Tools) -> ToolCallParser:
        """A new parser, for one output."""
        return PythonicParser(frozenset(names_of(tools)))


class PythonicParser(StreamingParser):
    """Parses a list of calls, one after another."""

    def __init__(self, known_names: frozenset[str]) -> None:
        super().__init__((_OPENER,))
        self._known_names = known_names
        self._pattern = _FIRST
        self._name, self._start = "", 0
        self._scanner, self._num_scanned = BracketScanner("\"'"), 0
        self._state = self._begin

    def _begin(self) -> bool:
        stripped = self._text.lstrip()
        self._space += self._take(len(self._text) - len(stripped))
        if not stripped and not self._is_final:
            return False
        self._state = self._open if stripped else self._content
        return True

    def _open(self) -> bool:
        self._pattern = _FIRST
        self._state = self._head
        return True

    def _head(self) -> bool:
        found, may_come = self._match(self._pattern)
        if may_come:
            return False
        if found is None and self._drop_unfinished(self._pattern):
            return True
        if found is None or found["name"] not in self._known_names:
            return self._no_call()
        self._name, self._start = found["name"], found.end() - 1
        self._scanner, self._num_scanned = BracketScanner("\"'"), self._start
        self._state = self._call
        return True

    def _call(self) -> bool:
        end = self._scanner.feed(self._text[self._num_scanned :])
        if end is None:
            self._num_scanned = len(self._text)
            if self._is_final and self._is_call_likely():
                return self._drop_rest()
            is_hopeless = self._is_final or self._num_scanned - self._start > MAX_CALL_CHARACTERS
            return self._no_call() if is_hopeless else False
        end += self._num_scanned
        arguments = _read_arguments(self._text[self._start : end])
        if arguments is None:
            return self._no_call()
        self._take(end)
        self._start_call(self._name)
        self._emit_arguments(arguments)
        self._state = self._after
        return True

    def _no_call(self) -> bool:
        if self._pattern is _FIRST:
            return self._reject()
        self._state = self._content
        return True

    def _after(self) -> bool:
        ending, may_end = self._match(_END)
        if ending is not None:
            self._take(ending.end())
            self._state = self._close
            return True
        following, may_follow = self._match(_NEXT)
        if following is None and (may_end or may_follow):
            return False
        if following is None and self._drop_unfinished(_END):
            return True
        self._pattern = _NEXT
        self._state = self._head
        return True

    def _close(self) -> bool:
        return self._leave_call(_CLOSE)


def _read_arguments(text: str) -> str | None:
    """`(a=1, b="x")` as a JSON object; None unless all arguments are literals given by name."""
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        arguments = {str(keyword.arg): _value(keyword.value, 0) for keyword in call.keywords if keyword.arg}
        is_whole = len(arguments) == len(call.keywords)
        return as_json(arguments) if is_whole else None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # raised by ast for malicious text
        return None


def _value(node: ast.expr, depth: int) -> Any:
    """The value of the literal `node`. Raises ValueError if it is not a literal."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str()):
            return node.value
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_value(part, depth + 1) for part in parts]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value, depth + 1) for key, value in zip(keys, values, strict=True)}
    raise ValueError("no literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("no text")
