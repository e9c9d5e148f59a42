"""The bytes of each token, which byte-level grammars need.

Tokenizers write their pieces in one of three alphabets, and no attribute says reliably in which: byte-level BPE
(GPT-2's stand-in characters), sentencepiece (`▁` for a space, `<0x0A>` for a byte) or plain text. So each is tried,
and the tokenizer's own decoder is the judge. A tokenizer that none of them explains is refused, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ulysses_infer.errors import RequestError

NUM_PROBES = 256  # tokens, spread over the vocabulary, for which an alphabet must agree with the decoder
MIN_CONFIRMED = 1
NEVER_IN_TEXT = 0xFF  # UTF-8 never contains this byte; the grammar library marks special tokens with it

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
Alphabet = Callable[[str], bytes | None]
"""Maps a vocabulary piece to its bytes; None if the piece is not in the alphabet."""


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """The bytes that each of the `vocab_size` token ids adds to the text; b"" for special tokens and those that add
    nothing.

    A model's vocabulary may be larger than its tokenizer's; the additional ids are b"" too. Raises RequestError if the
    tokenizer works in an unknown way.
    """
    vocabulary = {int(token): str(piece) for piece, token in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
    pieces = {t: piece for t, piece in vocabulary.items() if t not in special and t not in added and t < vocab_size}
    table = [b""] * vocab_size
    for token, piece in _read(tokenizer, pieces).items():
        table[token] = piece
    for token, entry in added.items():
        if token not in special and token < vocab_size:
            table[token] = str(entry.content).encode()
    return [b"" if NEVER_IN_TEXT in piece else piece for piece in table]


def _read(tokenizer: Any, pieces: dict[int, str]) -> dict[int, bytes]:
    """The bytes of `pieces` in the alphabet that agrees with the decoder."""
    step = max(len(pieces) // NUM_PROBES, 1)
    probes = sorted(pieces)[::step]
    for alphabet in (byte_level, sentencepiece, _plain):
        found = {token: alphabet(piece) for token, piece in pieces.items()}
        known = {token: piece for token, piece in found.items() if piece is not None}
        if len(known) == len(found) and _agrees(tokenizer, known, probes):
            return known
    raise RequestError("structured_outputs does not understand this model's tokenizer; leave structured_outputs out")


def _agrees(tokenizer: Any, table: dict[int, bytes], probes: list[int]) -> bool:
    """Whether decoding a probe after other text adds exactly its bytes. Parts of characters are not compared."""
    anchor = next((token for token, piece in table.items() if piece.isalpha() and piece.isascii()), None)
    if anchor is None:
        return False
    confirmed = 0
    for probe in probes:
        text = (table[anchor] + table[probe]).decode(errors="replace")
        decoded = tokenizer.decode([anchor, probe], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" not in text and decoded != text:
            return False
        confirmed += decoded == text
    return confirmed >= MIN_CONFIRMED


def _plain(piece: str) -> bytes:
    return piece.encode(errors="replace")


def sentencepiece(piece: str) -> bytes:
    """The bytes of a sentencepiece piece."""
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode(errors="replace")


def byte_level(piece: str) -> bytes | None:
    """The bytes of a byte-level piece; None if it has other characters."""
    try:
        return piece.translate(_STAND_INS).encode("latin-1")
    except UnicodeEncodeError:
        return None


def _stand_ins() -> dict[int, int]:
    """GPT-2's character for each byte, reversed: printable bytes stand for themselves, others are mapped above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {256 + position: byte for position, byte in enumerate(others)}
    # A byte that is mapped never stands for itself: 256 is no latin-1 character, so such a piece is refused.
    return {**dict.fromkeys(others, 0x100), **stand_ins}


_STAND_INS = _stand_ins()
