"""Bad words: which tokens would complete one of them.

A bad word is forbidden as text, however it is split into tokens: "hello" is not written as "hel" + "lo" either. As in
vLLM, a word is forbidden alone and after a space; a word that begins with white space is forbidden as it is. A part of
a longer word does not count where one token spells it: "ass" does not forbid the token "class".
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

MAX_CACHED = 4096  # remainders of words whose tokens are kept


class Spellings:
    """Finds tokens by their bytes. Build one per tokenizer."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        """token_bytes: the bytes of each token id; b"" for tokens without text."""
        self.token_bytes = token_bytes
        self._sorted = sorted((piece, token) for token, piece in enumerate(token_bytes) if piece)
        self.completing = functools.lru_cache(MAX_CACHED)(self._completing)
        self.containing = functools.lru_cache(MAX_CACHED)(self._containing)

    def _completing(self, rest: bytes) -> tuple[int, ...]:
        """Tokens that begin with `rest`, after which no word goes on."""
        found, place = [], bisect.bisect_left(self._sorted, (rest, -1))
        while place < len(self._sorted) and self._sorted[place][0].startswith(rest):
            piece, token = self._sorted[place]
            if not _goes_on(rest[-1], piece[len(rest) : len(rest) + 1]):
                found.append(token)
            place += 1
        return tuple(found)

    def _containing(self, word: bytes) -> tuple[int, ...]:
        """Tokens that contain `word` as a whole word, or begin with it."""
        inside = {token for piece, token in self._sorted if word in piece and _has_word(piece, word)}
        return tuple(sorted(inside.union(self.completing(word))))


class BadWords:
    """The bad words of one request."""

    def __init__(
        self, sequences: Sequence[Sequence[int]], words: Sequence[str] = (), spellings: Spellings | None = None
    ) -> None:
        """sequences: token ids that spell the words, as the tokenizer writes them; words: their text, for all other
        ways to spell them with `spellings`."""
        self._sequences = sequences
        self._spellings = spellings
        self._words = [] if spellings is None else sorted({variant for word in words for variant in _variants(word)})
        self._longest = max(map(len, self._words), default=0)

    def completing(self, output_token_ids: Sequence[int]) -> list[int]:
        """Tokens that would complete a bad word after `output_token_ids`."""
        forbidden = [
            last
            for *prefix, last in self._sequences
            if len(output_token_ids) >= len(prefix) and _ends_with(output_token_ids, prefix)
        ]
        if self._spellings is not None:
            forbidden += self._spelled(self._spellings, output_token_ids)
        return forbidden

    def _spelled(self, spellings: Spellings, output_token_ids: Sequence[int]) -> list[int]:
        text, starts = _tail(spellings.token_bytes, output_token_ids, self._longest)
        forbidden: list[int] = []
        for word in self._words:
            forbidden += spellings.containing(word)
            for length in range(1, min(len(word), len(text) + 1)):
                start = len(text) - length
                may_start = start in starts or not _goes_on(word[0], text[start - 1 : start])
                if may_start and text.endswith(word[:length]):
                    forbidden += spellings.completing(word[length:])
        return forbidden


def _ends_with(token_ids: Sequence[int], suffix: Sequence[int]) -> bool:
    return list(token_ids[len(token_ids) - len(suffix) :]) == list(suffix)


def _variants(word: str) -> list[bytes]:
    text = word.encode(errors="replace")
    return [text] if word[:1].isspace() else [text, b" " + text]


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


def _has_word(piece: bytes, word: bytes) -> bool:
    """Whether `piece` contains `word` with no word going on at either end."""
    start = piece.find(word)
    while start >= 0:
        end = start + len(word)
        before, after = piece[start - 1 : start] if start else b"", piece[end : end + 1]
        if not _goes_on(word[0], before) and not _goes_on(word[-1], after):
            return True
        start = piece.find(word, start + 1)
    return False


def _goes_on(edge: int, beside: bytes) -> bool:
    """Whether a word goes on from its edge byte to the byte beside it; b"" is the end of the text."""
    return bool(beside) and _is_letter(edge) and _is_letter(beside[0])


def _is_letter(byte: int) -> bool:
    """ASCII letters, digits and the underscore, and every byte of other characters."""
    return byte >= 0x80 or byte == ord("_") or chr(byte).isalnum()
