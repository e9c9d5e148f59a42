"""The first space of an output, which sentencepiece decoders drop: a grammar must not see what the user does not.

The first token of such an output counts without its space. The grammar library knows one text per token, so a second
vocabulary masks the first token, and the main one follows it by other tokens that spell the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ulysses_infer.text.detokenizer import TokenDecoder


def drops_first_space(decoder: TokenDecoder, token_bytes: Sequence[bytes]) -> bool:
    """Whether the decoder drops the space that the first token of a text begins with."""
    for token, piece in enumerate(token_bytes):
        if piece[:1] == b" " and piece[1:].isalpha() and piece.isascii():
            return decoder.text_of(token) == piece[1:].decode()
    return False


class Speller:
    """Spells text in tokens. Build one per tokenizer."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._tokens = {piece: token for token, piece in enumerate(token_bytes) if piece}
        self._longest = max(map(len, self._tokens), default=0)
        self.spell = functools.lru_cache(4096)(self._spell)

    def _spell(self, text: bytes) -> tuple[int, ...] | None:
        """Tokens that together are `text`; None if there are none."""
        rests: list[tuple[int, ...] | None] = [None] * len(text) + [()]  # the tokens of text[start:]
        for start in reversed(range(len(text))):
            for stop in range(min(len(text), start + self._longest), start, -1):
                token, rest = self._tokens.get(text[start:stop]), rests[stop]
                if token is not None and rest is not None:
                    rests[start] = (token, *rest)
                    break
        return rests[0]
