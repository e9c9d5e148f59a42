"""What rank 0 tells the ranks about drafting with a head: the tokens that followed a step, and how many to draft."""

from __future__ import annotations

from typing import NamedTuple

import msgpack

FOLLOW, CHAIN = 0, 1


class Follow(NamedTuple):
    """After a step: where each of its items is to go on. The head runs over all of the step's tokens."""

    rows: list[int]
    """For each item of the step's plan, the row of its last token that is part of the text."""
    next_tokens: list[int]
    """The token after that one."""
    drafting: list[int]
    """The items whose next tokens are wanted, ascending."""


class Chain(NamedTuple):
    """Before a step: draft tokens, one after another."""

    picked: list[int]
    """Which of `Follow.drafting` to draft for, ascending places in it."""
    num_tokens: int
    """Tokens to draft for each."""


def encode(message: Follow | Chain) -> bytes:
    """The message as bytes."""
    encoded: bytes = msgpack.packb((FOLLOW if isinstance(message, Follow) else CHAIN, *message))
    return encoded


def decode(payload: bytes) -> Follow | Chain:
    """The inverse of `encode`."""
    kind, *fields = msgpack.unpackb(payload)
    return Follow(*fields) if kind == FOLLOW else Chain(*fields)
