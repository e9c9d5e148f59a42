from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.tiny import encode
from ulysses_infer.config import Config, ModelConfig, ServerConfig
from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.server.http.texts import INLINE_CHARACTERS, Texts, load_texts


def bpe_texts(kind: str, folder: Path) -> Texts:
    """A vocabulary that writes "é" and a space in the way of `kind`."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    written = {
        "byte_level": {"Ã": 0, "©": 1, "Ġa": 2, "b": 3},
        "sentencepiece": {"<0xC3>": 0, "<0xA9>": 1, "▁a": 2, "b": 3},
    }[kind]
    tokenizer = Tokenizer(models.BPE(vocab=written, merges=[]))
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.ByteLevel() if kind == "byte_level" else decoders.Sequence(fallback)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.add_special_tokens({"eos_token": "<|Ġend|>"})
    wrapped.save_pretrained(folder)
    return Texts(AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_token_is_its_own_bytes_even_if_they_are_no_character(kind: str, tmp_path: Path) -> None:
    texts = bpe_texts(kind, tmp_path)
    assert [texts.piece(token) for token in range(5)] == [b"\xc3", b"\xa9", b" a", b"b", "<|Ġend|>".encode()]
    assert texts.token_text(0) == "\ufffd"
    assert texts.piece(1000) == b""


def test_long_text_is_encoded_off_the_event_loop(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    for tokenizer in (texts._tokenizer, texts._spare):
        monkeypatch.setattr(tokenizer, "encode", lambda text, **options: threads.append(threading.get_ident()) or [5])
    for length in (INLINE_CHARACTERS, INLINE_CHARACTERS + 1):
        asyncio.run(texts.encode("a" * length, True))
    assert threads[0] == threading.get_ident()
    assert threads[1] != threading.get_ident()


def test_both_ways_of_encoding_agree(texts: Texts) -> None:
    text = "some words, " * 500
    assert asyncio.run(texts.encode(text, True)) == encode(text)
    assert asyncio.run(texts.encode(text[:100], True)) == encode(text[:100])


def test_without_a_tokenizer_only_token_ids_are_served() -> None:
    texts = Texts(None)
    with pytest.raises(RequestError, match="needs a tokenizer"):
        asyncio.run(texts.encode("a", True))
    with pytest.raises(RequestError, match="no tokenizer"):
        texts.decode([1])
    assert (texts.chat_template, texts.token_text(3)) == (None, "")


def test_the_recipes_chat_template_replaces_the_checkpoints(tmp_path: Path) -> None:
    from tests.tiny import write_tokenizer

    write_tokenizer(tmp_path)
    (tmp_path / "mine.jinja").write_text("mine")
    server = ServerConfig(chat_template=str(tmp_path / "mine.jinja"))
    assert load_texts(Config(model=ModelConfig(path=str(tmp_path)), server=server)).chat_template == "mine"
    server.chat_template = str(tmp_path / "absent.jinja")
    with pytest.raises(ConfigError, match=r"absent\.jinja"):
        load_texts(Config(model=ModelConfig(path=str(tmp_path)), server=server))
