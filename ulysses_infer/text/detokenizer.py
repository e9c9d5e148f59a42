"""Incremental detokenization: never half a character, never half a stop string.

`TokenDecoder` wraps a Hugging Face tokenizer once per engine; a `Detokenizer` per output turns new tokens
into the text to stream. Joined, the pieces are the tokenizer's decoding of all tokens, cut at a stop string.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ulysses_infer.errors import RequestError
from ulysses_infer.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"  # a decoder writes this for bytes that are not, or not yet, a character
WINDOW = 16  # tokens decoded together before the oldest are dropped
CONTEXT_SEARCH = 16  # prompt tokens searched for one that text can follow

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # sentencepiece's byte fallback


class TokenDecoder:
    """What incremental decoding needs from a tokenizer, fast or slow. Build it once per engine."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode = _decoding(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self._bytes = {
            i: int(str(piece)[3:5], 16) for piece, i in vocabulary.items() if _BYTE_TOKEN.fullmatch(str(piece))
        }
        candidates = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self._known = frozenset(vocabulary.values()) | candidates
        self._skipped = frozenset(token_id for token_id in candidates if self._vanishes(token_id))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of `token_ids`, without cleaning up spaces before punctuation."""
        return self._decode(list(token_ids), skip_special_tokens)

    def is_visible(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether the token adds to the text; ids that only pad the vocabulary do not."""
        return token_id in self._known and not (skip_special_tokens and token_id in self._skipped)

    def text_of(self, token_id: int) -> str:
        """The text of a single token; "" for ids that the tokenizer does not know or cannot decode."""
        try:
            return self.decode([token_id], False) if token_id in self._known else ""
        except Exception:  # tokenizers in Python raise anything for an id that they do not expect
            return ""

    def skipped_parts(self, texts: Sequence[str]) -> dict[int, str]:
        """The skipped special tokens whose text occurs in one of `texts`, with that text."""
        return {token: part for token, part in self._skipped_texts.items() if any(part in text for text in texts)}

    @functools.cached_property
    def special_texts(self) -> dict[str, list[int]]:
        """The texts of special tokens that are skipped, with the ids that have them."""
        ids: dict[str, list[int]] = {}
        for token_id, text in sorted(self._skipped_texts.items()):
            ids.setdefault(text, []).append(token_id)
        return ids

    @functools.cached_property
    def _skipped_texts(self) -> dict[int, str]:
        return {token_id: self.decode([token_id], False) for token_id in self._skipped}

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is a single byte, written when the vocabulary lacks a character."""
        return token_id in self._bytes

    def byte_tokens(self, values: Collection[int]) -> frozenset[int]:
        """The tokens that are one of these bytes."""
        return frozenset(token_id for token_id, value in self._bytes.items() if value in values)

    def _vanishes(self, token_id: int) -> bool:
        """Whether skipping special tokens skips this one (tokenizers disagree about what is special)."""
        return not self.decode([token_id], True) and bool(self.decode([token_id], False))


def _decoding(tokenizer: Any) -> Callable[[list[int], bool], str]:
    """How `tokenizer` decodes. If a fast tokenizer uses transformers' own `decode`, its Rust part is called directly,
    which is four times as fast for a few tokens."""
    from transformers import TokenizersBackend

    kind = type(tokenizer)
    own = isinstance(tokenizer, TokenizersBackend)
    if own and kind.decode is TokenizersBackend.decode and kind._decode is TokenizersBackend._decode:
        backend = tokenizer.backend_tokenizer
        return lambda token_ids, skip: backend.decode(token_ids, skip_special_tokens=skip)
    return lambda token_ids, skip: tokenizer.decode(
        token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )


class TextStream:
    """Token ids to text as soon as it is certain. Decodes a window of the last tokens, not the whole output.

    Two things make text uncertain. A trailing U+FFFD may be the beginning of a character (byte-level BPE).
    And a run of byte tokens is decoded as a whole: one wrong byte turns all its characters into U+FFFD, so it
    is held back until it ends.

    The window starts where a character starts, and with text, because decoders treat the start of a text
    specially (sentencepiece drops its first space). For the same reason a prompt that ends in text lends its
    last token as a beginning; after a special token the output is a text of its own.
    """

    def __init__(self, decoder: TokenDecoder, skip_special_tokens: bool, prompt_token_ids: Sequence[int]) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._window = self._context(prompt_token_ids)
        self._boundary = len(self._window)  # where the last certain character of the window ended
        self._num_emitted = len(self._decode(self._window))  # characters of the window's text already emitted

    def push(self, token_id: int) -> str:
        """Add one token; returns the text that became certain."""
        if not self._decoder.is_visible(token_id, self._skip_special_tokens):
            return ""
        self._window.append(token_id)
        if self._decoder.is_byte(token_id):
            return ""
        text = self._decode(self._window)
        is_certain = not text.endswith(REPLACEMENT)
        delta = self._emit(text if is_certain else text[:-1])
        if len(self._window) >= WINDOW:
            self._move_window(text, is_certain)
        if is_certain:
            self._boundary = len(self._window)
        return delta

    def finish(self) -> str:
        """The text held back, decoded as if nothing follows."""
        return self._emit(self._decode(self._window))

    def pending(self) -> str:
        """What `finish` would return, as far as it is whole characters."""
        if self._boundary == len(self._window):
            return ""
        return self._decode(self._window)[self._num_emitted :].partition(REPLACEMENT)[0]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, self._skip_special_tokens)

    def _emit(self, certain: str) -> str:
        """The part of the window's `certain` text that was not emitted yet."""
        delta = certain[self._num_emitted :]
        self._num_emitted += len(delta)
        return delta

    def _move_window(self, text: str, is_certain: bool) -> None:
        """Drop the window's oldest tokens, keeping some text as context for the next ones."""
        start = self._boundary if is_certain else self._inner_boundary(text)
        tail = self._decode(self._window[start:])
        if start and tail:
            self._window = self._window[start:]
            self._boundary = 0
            self._num_emitted = len(tail) if is_certain else len(tail) - 1

    def _inner_boundary(self, text: str) -> int:
        """Where the last token starts, if a character starts there too; otherwise 0.

        The window's `text` ends in U+FFFD. Splitting inside a character would decode to more of them. A character has
        at most 4 bytes, so endless invalid bytes cannot make the window grow.
        """
        start = len(self._window) - 1
        is_split = self._decode(self._window[:start]) + self._decode(self._window[start:]) == text
        return start if is_split else 0

    @staticmethod
    def begins_a_text(decoder: TokenDecoder, prompt_token_ids: Sequence[int]) -> bool:
        """Whether an output after this prompt is decoded as a text of its own, which may lose its first space."""
        return not TextStream(decoder, True, prompt_token_ids)._window

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The last prompt token with whole characters, if the prompt ends in text."""
        for token_id in reversed(prompt_token_ids[-CONTEXT_SEARCH:]):
            if not self._decoder.is_visible(token_id, self._skip_special_tokens):
                return []
            text = self._decode([token_id])
            if text and REPLACEMENT not in text and not self._decoder.is_byte(token_id):
                return [token_id]
        return []


class StopMatcher:
    """Finds all stop strings at once in a stream of characters (Knuth, Morris, Pratt 1977)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._borders = [_borders(stop) for stop in stops]
        self._matched = [0] * len(stops)  # characters of each stop string that the text ends with
        self._first = {stop[0] for stop in stops}

    def feed(self, character: str) -> str | None:
        """Add a character; returns the longest stop string that ends with it."""
        complete = ""
        for index, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            matched = _extend(stop, borders, self._matched[index], character)
            if matched == len(stop):
                complete = max(complete, stop, key=len)
                matched = borders[matched]
            self._matched[index] = matched
        return complete or None

    def may_begin_in(self, text: str) -> bool:
        """Whether a stop string may begin in `text`: quick, for most text."""
        return not self._first.isdisjoint(text)

    def would_find(self, text: str) -> bool:
        """Whether a stop string would be complete within `text`, which is not added."""
        matched = list(self._matched)
        found = any(self.feed(character) for character in text)
        self._matched = matched
        return found

    @property
    def num_held(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        return max(self._matched, default=0)


def _extend(stop: str, borders: Sequence[int], matched: int, character: str) -> int:
    """The matched length of `stop` after `character`, if `matched` characters matched before."""
    while matched and stop[matched] != character:
        matched = borders[matched]
    return matched + 1 if stop[matched] == character else 0


def _borders(stop: str) -> list[int]:
    """Per length, the longest proper prefix of `stop` of that length that is also its suffix."""
    borders = [0, 0]
    for character in stop[1:]:
        borders.append(_extend(stop, borders, borders[-1], character))
    return borders


class Detokenizer:
    """The text of one output, growing. `stop_reason` is the stop string that ended it, or None.

    Of two stop strings the one that is complete first wins, the longer if at the same character. A stop
    string counts only if a token after the first `min_tokens` completes it (as in vLLM). Text that is held back because
    it may change counts as if the output ended there. A special token that is skipped counts only for stop strings
    that contain its text. Without a decoder, or with `detokenize=False`, the text stays empty. Whether a final eos or
    stop token is appended at all is the caller's choice. Raises RequestError for stop strings without a decoder.
    """

    def __init__(
        self, decoder: TokenDecoder | None, params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        if decoder is None and params.stop:
            raise RequestError(f"stop={params.stop!r} needs a tokenizer; set model.tokenizer or use stop_token_ids")
        self.stop_reason: str | None = None
        self._stream = None
        if decoder is not None and params.detokenize:
            self._stream = TextStream(decoder, params.skip_special_tokens, prompt_token_ids)
        self._matcher = StopMatcher(params.stop_strings)
        self._hidden: dict[int, str] = {}  # text of skipped tokens that stop strings contain
        if self._stream is not None and decoder is not None and params.stop_strings and params.skip_special_tokens:
            self._hidden = decoder.skipped_parts(params.stop_strings)
        self._has_stops = bool(params.stop_strings)
        self._last_bytes: frozenset[int] = frozenset()  # byte tokens that may complete a stop string while held back
        if decoder is not None and params.stop_strings:
            self._last_bytes = decoder.byte_tokens({stop.encode(errors="replace")[-1] for stop in params.stop_strings})
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._pieces: list[str] = []
        self._held = ""  # certain text that may be the beginning of a stop string
        self._shown: list[bool] = []  # which of its characters are part of the output's text

    @property
    def text(self) -> str:
        """All the text emitted so far."""
        return "".join(self._pieces)

    def append(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the new text. Tokens after a stop string are ignored."""
        first = len(self._pieces)
        for token_id in token_ids:
            if self._stream is not None and self.stop_reason is None:
                self._num_tokens += 1
                self._add(self._stream, token_id)
        return "".join(self._pieces[first:])

    def finish(self) -> str:
        """End the output: returns the text held back so far, which may complete a stop string."""
        first = len(self._pieces)
        if self._stream is not None and self.stop_reason is None:
            self._accept(self._stream.finish())
            self._release(len(self._held))
        return "".join(self._pieces[first:])

    def _add(self, stream: TextStream, token_id: int) -> None:
        if token_id in self._hidden:
            self._accept(self._hidden[token_id], shown=False)
            return
        self._accept(stream.push(token_id))
        may_stop = token_id in self._last_bytes and self.stop_reason is None and self._num_tokens > self._min_tokens
        if may_stop and self._matcher.would_find(stream.pending()):
            self._accept(stream.finish())

    def _accept(self, text: str, shown: bool = True) -> None:
        """Add certain text and emit what can no longer be part of a stop string. shown: it is part of the output."""
        if not self._has_stops or (not self._held and not self._matcher.may_begin_in(text)):
            self._pieces += [text] if text and shown else []
            return
        may_stop = self._num_tokens > self._min_tokens
        for position, character in enumerate(text):
            stop = self._matcher.feed(character)
            if stop and may_stop:
                self._hold(text[: position + 1], shown)
                self._end(stop)
                return
        self._hold(text, shown)
        self._release(len(self._held) - self._matcher.num_held)

    def _hold(self, text: str, shown: bool) -> None:
        self._held += text
        self._shown += [shown] * len(text)

    def _end(self, stop: str) -> None:
        """Emit the text before the stop string, which is the end of the held text, or with it."""
        self.stop_reason = stop
        length = len(self._held) - len(stop)
        if self._include_stop:
            self._shown[length:] = [True] * len(stop)
            length = len(self._held)
        self._release(length)
        self._hidden, self._held, self._shown = {}, "", []

    def _release(self, length: int) -> None:
        """Emit the first `length` characters held, without hidden ones."""
        if length > 0:
            shown = zip(self._held[:length], self._shown[:length], strict=True)
            self._pieces.append("".join(character for character, is_shown in shown if is_shown))
            self._held, self._shown = self._held[length:], self._shown[length:]
