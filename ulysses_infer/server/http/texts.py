"""The tokenizer of the server: encodes without blocking streams, decodes incrementally."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ulysses_infer.config import Config
from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.server.http.conversation import Conversation, render
from ulysses_infer.text.chat_template import ChatTemplate
from ulysses_infer.text.detokenizer import TokenDecoder
from ulysses_infer.text.encoding import encode
from ulysses_infer.text.token_bytes import byte_level, sentencepiece

T = TypeVar("T")
INLINE_CHARACTERS = 4096  # characters that are encoded on the event loop: about a millisecond
CACHED_TOKENS = 1 << 14
NO_TOKENIZER = "there is no tokenizer; set model.tokenizer"
OF_THIS_MACHINE = ("vocab_file", "merges_file", "tokenizer_file", "name_or_path", "chat_template")
"""What /tokenizer_info leaves out of a tokenizer's arguments: paths, and the template that may be replaced."""


class Texts:
    """Encodes and decodes. Without a tokenizer only token ids can be served.

    Long texts are encoded in a thread with its own tokenizer, because threads must not share one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._spare = tokenizer, copy.deepcopy(tokenizer)
        self.decoder = None if tokenizer is None else TokenDecoder(tokenizer)
        self._pieces = None if tokenizer is None else TokenPieces(tokenizer)
        self._template, self._spare_template = ChatTemplate(self._tokenizer), ChatTemplate(self._spare)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def chat_template(self) -> str | None:
        """The text of the chat template; the one for tool use if there are several."""
        template = getattr(self._tokenizer, "chat_template", None)
        if isinstance(template, dict):
            return template.get("tool_use") or template.get("default")
        return template

    def tokenizer_info(self) -> dict[str, Any]:
        """The tokenizer's configuration, without files of this machine. Raises `RequestError` without a tokenizer."""
        if self._tokenizer is None:
            raise RequestError(NO_TOKENIZER)
        given = {name: value for name, value in self._tokenizer.init_kwargs.items() if name not in OF_THIS_MACHINE}
        found = {**_as_json(given), "tokenizer_class": type(self._tokenizer).__name__}
        return found if self.chat_template is None else {**found, "chat_template": self.chat_template}

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`. Raises `RequestError`."""
        return await self._run(len(text), lambda tokenizer: encode(tokenizer, text, add_special_tokens))

    def encode_inline(self, text: str) -> list[int]:
        """Token ids of a short text, without special tokens. Raises `RequestError`."""
        return encode(self._tokenizer, text, False)

    async def render(self, conversation: Conversation) -> str:
        """The conversation rendered by the chat template. Raises `RequestError`."""
        return await self._run(conversation.num_characters, lambda tokenizer: self._render(tokenizer, conversation))

    def _render(self, tokenizer: Any, conversation: Conversation) -> str:
        return render(self._template if tokenizer is self._tokenizer else self._spare_template, conversation)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, with special tokens. Raises `RequestError` without a tokenizer."""
        if self.decoder is None:
            raise RequestError(NO_TOKENIZER)
        decoder = self.decoder
        return decoder.decode([token for token in token_ids if decoder.is_visible(token, False)], False)

    def piece(self, token_id: int) -> bytes:
        """The bytes of a token, which may be part of a character."""
        if self._pieces is None or self.decoder is None or not self.decoder.is_visible(token_id, False):
            return b""
        return self._pieces.of(token_id)

    def token_text(self, token_id: int) -> str:
        """The text of a single token."""
        return self.piece(token_id).decode(errors="replace")

    async def _run(self, size: int, work: Callable[[Any], T]) -> T:
        if size <= INLINE_CHARACTERS:
            return work(self._tokenizer)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._spare)


def _as_json(value: Any) -> Any:
    """A tokenizer's argument as it is in tokenizer_config.json: special tokens are their texts."""
    if isinstance(value, Mapping):
        return {str(name): _as_json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


class TokenPieces:
    """The bytes of each token, by the encoding of the vocabulary."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._literal = frozenset(tokenizer.added_tokens_decoder)
        self._convert = _converter(tokenizer)
        self.of = functools.lru_cache(CACHED_TOKENS)(self._of)

    def _of(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # an id that only pads the vocabulary
            return b""
        return str(piece).encode() if token_id in self._literal else self._convert(str(piece))


def _converter(tokenizer: Any) -> Callable[[str], bytes]:
    kinds = _decoder_kinds(tokenizer)
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"ByteFallback", "Metaspace"}:
        return sentencepiece
    return str.encode


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """The types of decoders in a fast tokenizer; Python tokenizers are sentencepiece's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"Metaspace"}
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return {part.get("type", "") for part in (decoder, *decoder.get("decoders", ()))}


def _byte_level(piece: str) -> bytes:
    found = byte_level(piece)
    return piece.encode() if found is None else found


def load_texts(config: Config) -> Texts:
    """The tokenizer of the checkpoint, with the chat template of the recipe.

    Raises `CheckpointError`, `ConfigError`.
    """
    from ulysses_infer.model.loading.sources import find_checkpoint
    from ulysses_infer.text.prompts import load_tokenizer

    model = config.model
    folder = None
    if not model.tokenizer:
        folder = find_checkpoint(model.path, model.revision, model.hf_config, model.dtype).find_files()
    tokenizer = load_tokenizer(model, folder)
    if config.server.chat_template is not None:
        if tokenizer is None:
            raise ConfigError("server.chat_template needs a tokenizer; set model.tokenizer")
        tokenizer.chat_template = read_template(config.server.chat_template)
    return Texts(tokenizer)


def read_template(path: str) -> str:
    """A chat template's text. Raises `ConfigError`."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.chat_template {path!r} cannot be read: {error}; give a file of text") from error
