"""Text to token ids, with every failure of a tokenizer as a `RequestError`."""

from __future__ import annotations

from typing import Any

from ulysses_infer.errors import RequestError, kind_and_line


def encode(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a prompt, at least one. Raises `RequestError`."""
    if tokenizer is None:
        raise RequestError("a text prompt needs a tokenizer; give token ids or set model.tokenizer")
    try:
        token_ids = list(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))
    except Exception as error:  # tokenizer libraries raise anything, for half a surrogate pair for example
        raise RequestError(f"the tokenizer refuses this prompt ({kind_and_line(error)}); change it") from error
    check_not_empty(token_ids)
    return token_ids


def check_not_empty(token_ids: list[Any]) -> None:
    """Raise `RequestError` for a prompt without tokens."""
    if not token_ids:
        raise RequestError("the prompt is empty; give at least one token")
