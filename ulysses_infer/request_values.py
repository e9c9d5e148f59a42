"""Values of request parameters, checked: a wrong one is a `RequestError` of one line with name, value and remedy."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from ulysses_infer.errors import RequestError

MAX_COUNT = 2**31 - 1  # no sequence is this long: a larger token count is a slip


def shown(value: object) -> str:
    """`repr(value)` short enough for one line; Python refuses to print an integer of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def unknown_key(key: object, known: Iterable[str], what: str = "sampling parameter") -> str:
    """The message for a key that is none of `known`."""
    nearest = difflib.get_close_matches(str(key), list(known), n=1)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(known)}"
    return f"unknown {what} {shown(key)}; {hint}"


def is_integer(value: object) -> bool:
    """Whether it is a whole number; true and false are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def integer(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`. Raises `RequestError`."""
    if not is_integer(value):
        raise RequestError(f"{name} must be an integer, got {shown(value)}; use {low} to {high}")
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low} to {high}, got {shown(int(value))}")
    return int(value)


def optional_integer(name: str, value: Any, low: int, high: int) -> int | None:
    """The same, or None."""
    return None if value is None else integer(name, value, low, high)


def real_number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> float:
    """A number from `low` (excluded with `open_low`) to `high`. Raises `RequestError`."""
    remedy = f"use a number {'above' if open_low else 'from'} {low:g} {'up ' if open_low else ''}to {high:g}"
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number:
        raise RequestError(f"{name} must be a number, got {shown(value)}; {remedy}")
    if not low <= value <= high or (open_low and value == low):  # NaN compares false
        raise RequestError(f"{name} is out of range, got {shown(value)}; {remedy}")
    return float(value)


def list_of(name: str, value: Any, remedy: str) -> list[Any]:
    """The items of a list; none for None. Raises `RequestError`."""
    if value is None:
        return []
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list, got {shown(value)}; {remedy}")
    return list(value)


def distinct_token_ids(name: str, value: Any) -> list[int]:
    """A list of token ids without duplicates. Raises `RequestError`."""
    token_ids = list_of(name, value, "use token ids, as in [1, 2]")
    for token_id in token_ids:
        if not is_integer(token_id) or not 0 <= token_id <= MAX_COUNT:
            raise RequestError(f"{name} has {shown(token_id)}, which is not a token id; use integers from 0 up")
    return list(dict.fromkeys(int(token_id) for token_id in token_ids))


def distinct_strings(name: str, value: Any) -> list[str]:
    """A list of strings without duplicates, none of them empty. Raises `RequestError`."""
    strings = list_of(name, value, 'use strings, as in ["a", "b"]')
    for string in strings:
        if not isinstance(string, str) or not string:
            raise RequestError(f"{name} has {shown(string)}; use strings that are not empty")
    return list(dict.fromkeys(strings))
