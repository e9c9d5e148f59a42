"""Whether two models read and write the same tokens, so that one can draft for the other."""

from __future__ import annotations

from typing import Any

from ulysses_infer.errors import ConfigError

Vocabulary = tuple[Any, int]
"""A tokenizer, None if it is not known, and the rows of the model's vocabulary, with padding."""


def check_same_tokens(served: Vocabulary, draft: Vocabulary) -> None:
    """Raise `ConfigError` if a token id means different tokens in the two models.

    Rows that are no tokens of either tokenizer only pad a vocabulary; their numbers may differ, as in models of
    different sizes of one family.
    """
    (own, size), (other, other_size) = served, draft
    if own is None or other is None:
        if size != other_size:
            raise ConfigError(
                f"its vocabulary has {other_size} tokens, that of the served model {size}; a draft model needs the "
                "same vocabulary"
            )
        return
    differing = _first_difference(own.get_vocab(), other.get_vocab())
    if differing is not None:
        number, mine, theirs = differing
        raise ConfigError(
            f"its vocabulary ({len(other)} tokens) is not that of the served model ({len(own)} tokens): token {number} "
            f"is {theirs!r} here and {mine!r} there; a draft model needs the same vocabulary"
        )


def _first_difference(own: dict[str, int], other: dict[str, int]) -> tuple[int, str | None, str | None] | None:
    """The lowest id that is not the same token in both, and what it is in each; None: no token."""
    if own == other:
        return None
    mine, theirs = ({number: token for token, number in each.items()} for each in (own, other))
    number = min(number for number in mine.keys() | theirs.keys() if mine.get(number) != theirs.get(number))
    return number, mine.get(number), theirs.get(number)
