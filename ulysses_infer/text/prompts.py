"""Prompts to token ids, and what else needs the tokenizer."""

from __future__ import annotations

import functools
import itertools
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import CheckpointError, RequestError, kind_and_line
from ulysses_infer.model.sampling.seeds import derive_seed
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.structured_outputs import StructuredOutputs
from ulysses_infer.text.bad_words import BadWords, Spellings
from ulysses_infer.text.chat_template import ChatTemplate, find_template
from ulysses_infer.text.detokenizer import TextStream, TokenDecoder
from ulysses_infer.text.encoding import check_not_empty, encode
from ulysses_infer.text.grammar_state import GrammarState
from ulysses_infer.text.structured import GrammarCompiler

logger = logging.getLogger(__name__)
MAX_CACHED = 32  # requests whose bad words are kept prepared
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class PromptReader:
    """Converts text, token ids or chat messages to token ids. Without a tokenizer only token ids are accepted."""

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        seed: int | None,
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """eos_token_ids: those beyond the vocabulary are ignored, because they cannot be sampled. seed: the engine's,
        from which requests without a seed get theirs; None: they get random ones. sampling_defaults: values of
        `SamplingParams` for requests that do not set them."""
        self.sampling_defaults = dict(sampling_defaults or {})
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.eos_token_ids = frozenset(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._template = ChatTemplate(tokenizer)
        self.decoder = None if tokenizer is None else TokenDecoder(tokenizer)
        self.grammars = GrammarCompiler(tokenizer, vocab_size)
        self._seed, self._unseeded = seed, itertools.count()
        self._bad_words = functools.lru_cache(MAX_CACHED)(self._make_bad_words)

    def read(self, prompt: Any) -> tuple[str | None, list[int]]:
        """The prompt's text (None for token ids) and its token ids. Raises `RequestError`."""
        if isinstance(prompt, str):
            return prompt, self._encode(prompt)
        if isinstance(prompt, list) and prompt and all(isinstance(part, dict) for part in prompt):
            text = self.render_chat(prompt)
            return text, self._encode(text, add_special_tokens=False)
        if isinstance(prompt, list | tuple):
            return None, self._check_ids(list(prompt))
        raise RequestError(f"a prompt is text, a list of token ids or chat messages, not {type(prompt).__name__}")

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """Chat messages as text by the checkpoint's template, ready for the assistant's turn."""
        return self._template.render(messages)

    def bad_words(self, params: SamplingParams) -> BadWords | None:
        """The constraint of `params.bad_words`; None without any. Raises `RequestError`."""
        if not params.bad_words:
            return None
        if self.tokenizer is None:
            raise RequestError("bad_words needs a tokenizer; set model.tokenizer")
        return self._bad_words(tuple(params.bad_words))

    def _make_bad_words(self, words: tuple[str, ...]) -> BadWords:
        # A word with a token that the model has no row for cannot be sampled in these tokens.
        encoded = SamplingParams(bad_words=list(words)).encode_bad_words(self.tokenizer)
        encoded = [word for word in encoded if max(word) < self.vocab_size]
        spellings = self._spellings
        if spellings is None:
            return BadWords(encoded)
        without_text = [word for word in encoded if not all(spellings.token_bytes[token] for token in word)]
        return BadWords(without_text, words, spellings)

    @functools.cached_property
    def _spellings(self) -> Spellings | None:
        """The tokens by their bytes; None for tokenizers whose bytes are not known."""
        try:
            return Spellings(self.grammars.token_bytes)
        except RequestError as error:
            logger.warning("bad words are only recognised as the tokenizer spells them: %s", error)
            return None

    def grammar(self, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> GrammarState | None:
        """The initial grammar state of `params.structured_outputs` after a prompt; None without constraints."""
        if not isinstance(params.structured_outputs, StructuredOutputs):
            return None
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        begins_a_text = self.decoder is not None and TextStream.begins_a_text(self.decoder, prompt_token_ids)
        return self.grammars.state(params.structured_outputs, eos.union(params.stop_token_ids or ()), begins_a_text)

    def seed(self, params: SamplingParams) -> int:
        """The request's seed: its own, else the next one derived from the engine's seed, else a random one."""
        if params.seed is not None:
            return params.seed
        if self._seed is None:
            return secrets.randbits(64)
        return derive_seed(self._seed, next(self._unseeded))

    def _encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._check_ids(encode(self.tokenizer, text, add_special_tokens))

    def _check_ids(self, token_ids: list[Any]) -> list[int]:
        check_not_empty(token_ids)
        for token in token_ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise RequestError(f"prompt token ids must be integers, not {token!r}")
            if not 0 <= token < self.vocab_size:
                raise RequestError(f"prompt token id {token} is outside the vocabulary; use 0 to {self.vocab_size - 1}")
        return token_ids


def load_tokenizer(settings: ModelConfig, folder: Path | None) -> Any:
    """The tokenizer of a checkpoint, or None if it has none (token ids are then the only prompts)."""
    from transformers import AutoTokenizer

    place = settings.tokenizer or folder
    if place is None:
        return None
    local = Path(place)
    if local.is_dir() and not any((local / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:  # tokenizer libraries raise anything for broken files, often a bare Exception
        raise CheckpointError(f"the tokenizer at {place} cannot be read: {kind_and_line(error)}") from error
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = find_template(place, settings.revision)
    return tokenizer
