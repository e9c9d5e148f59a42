"""Prompts to token ids, and what else needs the tokenizer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import CheckpointError, RequestError, kind_and_line
from ulysses_infer.model.sampling.sampler import derive_seed
from ulysses_infer.sampling_params import SamplingParams, StructuredOutputs
from ulysses_infer.text.detokenizer import TokenDecoder
from ulysses_infer.text.structured import GrammarCompiler, GrammarState

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class PromptReader:
    """Converts text, token ids or chat messages to token ids. Without a tokenizer only token ids are accepted."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int], seed: int) -> None:
        self.tokenizer, self.vocab_size, self.eos_token_ids = tokenizer, vocab_size, eos_token_ids
        self.decoder = None if tokenizer is None else TokenDecoder(tokenizer)
        self.grammars = GrammarCompiler(tokenizer, vocab_size)
        self._seed, self._unseeded = seed, itertools.count()

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
        import jinja2

        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise RequestError("the checkpoint has no chat template; give a plain prompt instead of messages")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        return str(text)

    def bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Token id sequences of `params.bad_words`."""
        if not params.bad_words:
            return []
        if self.tokenizer is None:
            raise RequestError("bad_words needs a tokenizer; set model.tokenizer")
        return params.encode_bad_words(self.tokenizer)

    def grammar(self, params: SamplingParams) -> GrammarState | None:
        """The initial grammar state of `params.structured_outputs`; None without constraints."""
        if not isinstance(params.structured_outputs, StructuredOutputs):
            return None
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        return self.grammars.state(params.structured_outputs, eos.union(params.stop_token_ids or ()))

    def seed(self, params: SamplingParams) -> int:
        """The request's seed: its own, or the next one of the engine's, so that a run can be repeated."""
        if params.seed is not None:
            return params.seed
        return derive_seed(self._seed, next(self._unseeded))

    def _encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if self.tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer; give token ids or set model.tokenizer")
        return self._check_ids(list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens)))

    def _check_ids(self, token_ids: list[Any]) -> list[int]:
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token")
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
        return AutoTokenizer.from_pretrained(
            place, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:  # tokenizer libraries raise anything for broken files, often a bare Exception
        raise CheckpointError(f"the tokenizer at {place} cannot be read: {kind_and_line(error)}") from error
