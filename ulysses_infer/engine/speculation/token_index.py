"""A growing text of token ids that finds where its end, or another text's end, occurred before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_PLACES = 256  # the latest occurrences that are compared
SEPARATOR = -1  # between two texts of one index; no token


class Match(NamedTuple):
    """Where the last tokens of a text occur in an index."""

    places: np.ndarray  # [m] int64, positions in the index after each occurrence, ascending
    length: int
    """Number of tokens that agree at all of them."""


class Continuation(NamedTuple):
    """Tokens that followed the places of a match."""

    tokens: list[int]
    shares: list[float]
    """Of the places reached by the tokens before each, the share that goes on with it."""


class TokenIndex:
    """Token ids with the places of every pair of neighbours, so that only occurrences are read, never the whole text.

    The places of a match and their continuations are the node of a suffix tree and the counts of its descendants. The
    tree itself is not built: a token takes one entry here, but one node per length there.
    """

    def __init__(self) -> None:
        self._tokens = np.empty(256, dtype=np.int64)
        self._size = 0
        self._places: dict[tuple[int, int], list[int]] = {}

    def __len__(self) -> int:
        return self._size

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens."""
        size = self._size + len(token_ids)
        if size > len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty(size, dtype=np.int64)])
        self._tokens[self._size : size] = token_ids
        before = int(self._tokens[self._size - 1]) if self._size else SEPARATOR
        for place, token in enumerate(token_ids, self._size + 1):
            if before != SEPARATOR and token != SEPARATOR:
                self._places.setdefault((before, token), []).append(place)
            before = token
        self._size = size

    def last(self, count: int) -> np.ndarray:
        """The last tokens, at most `count`."""
        return self._tokens[max(0, self._size - count) : self._size]

    def find(self, tail: np.ndarray, least: int) -> Match | None:
        """The occurrences of the longest end of `tail` that something follows; None if fewer than `least` tokens (at
        least 2) of it occur."""
        if len(tail) < least:
            return None
        known = self._places.get((int(tail[-2]), int(tail[-1])), ())
        if not known or known[0] >= self._size:
            return None  # the usual case in a text without repetitions
        places = np.array(known[-MOST_PLACES:], dtype=np.int64)
        places = places[places < self._size]
        if not len(places):
            return None
        before = places[:, None] - np.arange(1, len(tail) + 1)  # [m, n], where the tokens of the reversed tail would be
        agrees = (self._tokens[np.maximum(before, 0)] == tail[::-1]) & (before >= 0)
        lengths = np.where(agrees.all(1), len(tail), agrees.argmin(1))
        longest = int(lengths.max())
        return Match(places[lengths == longest], longest) if longest >= least else None

    def follow(self, places: np.ndarray, most: int) -> Continuation:
        """At most `most` tokens after `places`, each the one at which most of the places left go on, the latest of
        equals."""
        tokens: list[int] = []
        shares: list[float] = []
        while len(places) > 1 and len(tokens) < most:
            found = self._tokens[places]
            token, count = _most_frequent(found.tolist())
            if token == SEPARATOR:
                return Continuation(tokens, shares)
            tokens.append(token)
            shares.append(count / len(places))
            places = (places if count == len(places) else places[found == token]) + 1
            if places[-1] == self._size:
                places = places[:-1]
        if len(places) == 1:
            rest = self._read(int(places[0]), most - len(tokens), tokens)
            tokens += rest
            shares += [1.0] * len(rest)
        return Continuation(tokens, shares)

    def _read(self, place: int, count: int, drafted: Sequence[int]) -> list[int]:
        """Up to `count` tokens from `place`. The text is taken to go on with `drafted` and then with what is read here,
        so a text that repeats itself is continued beyond its end."""
        tokens = self._tokens[place : min(self._size, place + count)].tolist()
        if SEPARATOR in tokens:
            return list(tokens[: tokens.index(SEPARATOR)])
        ahead = [*drafted, *tokens]
        while tokens and len(tokens) < count:
            token = ahead[place + len(tokens) - self._size]
            tokens.append(token)
            ahead.append(token)
        return list(tokens)


def _most_frequent(found: list[int]) -> tuple[int, int]:
    """(token, count): the most frequent one; of equally frequent ones, the one that occurs last."""
    last = found[-1]
    if found.count(last) == len(found):
        return last, len(found)
    counts = Counter(found)
    most = max(counts.values())
    return next(token for token in reversed(found) if counts[token] == most), most
