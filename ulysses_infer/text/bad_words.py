"""Bad words: which tokens would complete one of them.

A bad word is forbidden as text, however it is split into tokens: "hello" is not written as "hel" + "lo" either. As in
vLLM, a word is forbidden alone and after a space; a word that begins with white space is forbidden as it is. A part of
a longer word does not count where one token spells it: "ass" does not forbid the token "class".
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

MAX_CACHED = 4096  # remainders of words whose tokens are kept
SEPARATOR = b"\xff"  # in no token's bytes
LETTER = rb"[0-9A-Za-z_\x80-\xfe]"  # ASCII letters, digits and the underscore, and every byte of other characters

_is_letter = re.compile(LETTER).match


class Spellings:
    """Finds tokens by their bytes. Build one per tokenizer."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        """token_bytes: the bytes of each token id; b"" for tokens without text."""
        self.token_bytes = token_bytes
        self._sorted = sorted((piece, token) for token, piece in enumerate(token_bytes) if piece)
        self.longest = max((len(piece) for piece, _ in self._sorted), default=0)
        self._joined = SEPARATOR.join(piece for piece, _ in self._sorted)  # searched much faster than a list
        self._starts = list(itertools.accumulate((len(piece) + 1 for piece, _ in self._sorted), initial=0))
        self.completing = functools.lru_cache(MAX_CACHED)(self._completing)
        self.containing = functools.lru_cache(MAX_CACHED)(self._containing)

    def _completing(self, rest: bytes) -> tuple[int, ...]:
        """Tokens that begin with `rest`, after which no word goes on."""
        found, place = [], bisect.bisect_left(self._sorted, (rest, -1))
        while place < len(self._sorted) and self._sorted[place][0].startswith(rest):
            piece, token = self._sorted[place]
            if not _goes_on(rest[-1:], piece[len(rest) : len(rest) + 1]):
                found.append(token)
            place += 1
        return tuple(found)

    def _containing(self, word: bytes) -> tuple[int, ...]:
        """Tokens that contain `word` as a whole word, or begin with it."""
        inside = set(self.completing(word))
        if word in self._joined:
            places = (bisect.bisect_right(self._starts, match.start()) - 1 for match in _whole(word, self._joined))
            inside.update(self._sorted[place][1] for place in places)
        return tuple(sorted(inside))


class BadWords:
    """The bad words of a request. It keeps nothing of the outputs, so they can share it."""

    def __init__(
        self, sequences: Sequence[Sequence[int]], words: Sequence[str] = (), spellings: Spellings | None = None
    ) -> None:
        """sequences: token ids that spell the words, as the tokenizer writes them; words: their text, for all other
        ways to spell them with `spellings`."""
        always = {last for *prefix, last in sequences if not prefix}
        self._sequences = [tuple(sequence) for sequence in sequences if len(sequence) > 1]
        self._spellings = spellings
        self._beginnings: dict[bytes, list[int]] = {}  # with the tokens that complete a word from there
        spelled = () if spellings is None else [word.encode(errors="replace") for word in words]
        self._longest = max(map(len, spelled), default=0)
        for word in spelled:
            assert spellings is not None
            always.update(spellings.containing(word))
            self._add_beginnings(word, spellings)
        self._always = np.array(sorted(always), dtype=np.int64)
        self._lengths = sorted(set(map(len, self._beginnings)))

    def _add_beginnings(self, word: bytes, spellings: Spellings) -> None:
        for length in range(max(1, len(word) - spellings.longest), len(word)):
            tokens = spellings.completing(word[length:])
            if tokens:
                self._beginnings.setdefault(word[:length], []).extend(tokens)

    def completing(self, output_token_ids: Sequence[int]) -> npt.NDArray[np.int64]:
        """Tokens that would complete a bad word after `output_token_ids`."""
        forbidden = [sequence[-1] for sequence in self._sequences if _ends_with(output_token_ids, sequence[:-1])]
        if self._spellings is not None:
            forbidden += self._going_on(self._spellings, output_token_ids)
        return np.append(self._always, forbidden).astype(np.int64) if forbidden else self._always

    def _going_on(self, spellings: Spellings, output_token_ids: Sequence[int]) -> Iterator[int]:
        """Tokens that would complete a word that earlier tokens begin."""
        text, starts = _tail(spellings.token_bytes, output_token_ids, self._longest)
        for length in self._lengths:
            start = len(text) - length
            tokens = self._beginnings.get(text[start:]) if start >= 0 else None
            if tokens and (start in starts or not _goes_on(text[start : start + 1], text[start - 1 : start])):
                yield from tokens


def _ends_with(token_ids: Sequence[int], suffix: Sequence[int]) -> bool:
    return len(token_ids) >= len(suffix) and tuple(token_ids[len(token_ids) - len(suffix) :]) == suffix


def _tail(token_bytes: Sequence[bytes], token_ids: Sequence[int], length: int) -> tuple[bytes, set[int]]:
    """At least `length` bytes of the text's end, fewer if it is shorter, and where tokens start in them."""
    pieces: list[bytes] = []
    size = 0
    for token in reversed(token_ids):
        if size >= length:
            break
        pieces.append(token_bytes[token])
        size += len(pieces[-1])
    starts, position = set(), 0
    for piece in reversed(pieces):
        starts.add(position)
        position += len(piece)
    return b"".join(reversed(pieces)), starts


def _whole(word: bytes, text: bytes) -> Iterator[re.Match[bytes]]:
    """Where `word` is in `text` with no word going on at either end."""
    escaped = re.escape(word)
    before = b"(?<!" + LETTER + escaped + b")" if _is_letter(word[:1]) else b""  # after the word: so it is found fast
    after = b"(?!" + LETTER + b")" if _is_letter(word[-1:]) else b""
    return re.finditer(escaped + before + after, text)


def _goes_on(edge: bytes, beside: bytes) -> bool:
    """Whether a word goes on from its edge byte to the byte beside it; b"" is the end of the text."""
    return bool(_is_letter(edge) and _is_letter(beside))
