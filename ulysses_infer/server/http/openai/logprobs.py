"""Log-probabilities in the three shapes of the API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ulysses_infer.server.http.texts import Texts
from ulysses_infer.text.detokenizer import TextStream

Scored = Sequence[tuple[int, float, int]]
"""(token id, log-probability, rank): the chosen token, then the most likely ones."""
LOWEST = -9999.0  # JSON has no infinity; this is OpenAI's substitute


class TokenNames:
    """Names of tokens in log-probabilities: their text, or "token_id:17"."""

    def __init__(self, texts: Texts, as_ids: bool) -> None:
        self._texts, self._as_ids = texts, as_ids

    def of(self, token_id: int) -> str:
        """A token's name."""
        return f"token_id:{token_id}" if self._as_ids else self._texts.token_text(token_id)

    def bytes_of(self, token_id: int) -> list[int]:
        """A token's bytes."""
        return list(self._texts.piece(token_id))


class LegacyLogprobs:
    """Builds the format of /v1/completions for one output: lists that continue from chunk to chunk.

    Offsets count characters of the response's text. context: token ids before it that are not part of it.
    """

    def __init__(self, texts: Texts, names: TokenNames, skip_special_tokens: bool, context: Sequence[int] = ()) -> None:
        self._names = names
        self._stream = None if texts.decoder is None else TextStream(texts.decoder, skip_special_tokens, context)
        self._num_characters = 0
        self._lists: dict[str, list[Any]] = {}
        self._clear()

    def add(self, token_id: int, scored: Scored | None, num_top: int) -> None:
        """Add a token with its `num_top` most likely ones; None for the first token of a prompt, which has no score."""
        lists = self._lists
        lists["tokens"].append(self._names.of(token_id))
        lists["token_logprobs"].append(None if scored is None else _finite(scored[0][1]))
        lists["top_logprobs"].append(None if scored is None else self._top(scored, num_top))
        lists["text_offset"].append(self._num_characters)
        if self._stream is not None:
            self._num_characters += len(self._stream.push(token_id))

    def take(self) -> dict[str, list[Any]]:
        """The lists of the tokens added since the last time."""
        lists = self._lists
        self._clear()
        return lists

    def _clear(self) -> None:
        self._lists = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def _top(self, scored: Scored, num_top: int) -> dict[str, float]:
        """The chosen token and the most likely ones. If several share a name, the most likely one counts."""
        top: dict[str, float] = {}
        for token_id, logprob, _ in (scored[0], *_likeliest(scored, num_top)):
            name = self._names.of(token_id)
            top[name] = max(top.get(name, LOWEST), _finite(logprob))
        return top


def chat_logprob(names: TokenNames, scored: Scored, num_top: int) -> dict[str, Any]:
    """One token in the format of /v1/chat/completions."""
    token_id, logprob, _ = scored[0]
    top = [_named(names, other, value) for other, value, _ in _likeliest(scored, num_top)]
    return {**_named(names, token_id, logprob), "top_logprobs": top}


def prompt_logprobs(texts: Texts, scored: Sequence[Scored | None]) -> list[dict[str, Any] | None]:
    """A prompt's tokens in vLLM's format: by token id, the first one None."""
    return [
        None
        if entry is None
        else {
            str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": texts.token_text(token_id)}
            for token_id, logprob, rank in entry
        }
        for entry in scored
    ]


def _likeliest(scored: Scored, num_top: int) -> Scored:
    return sorted(scored, key=lambda entry: entry[2])[:num_top]


def _named(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    return {"token": names.of(token_id), "logprob": _finite(logprob), "bytes": names.bytes_of(token_id)}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
