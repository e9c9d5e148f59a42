import pytest
from tokenizers_to_try import KINDS, byte_level, make, sentencepiece, word_piece

from ulysses_infer.errors import RequestError
from ulysses_infer.text.token_bytes import token_bytes

TEXTS = ["hello", '{"name": [1, 2]}', "a  b\tc", "http://x/", "  two"]
WIDE_TEXTS = ["né日本語 😀", "\n\r\x00é"]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_joined_are_the_text(kind, tmp_path):
    tokenizer = make(kind, tmp_path)
    table = token_bytes(tokenizer, len(tokenizer) + 5)
    for text in TEXTS + (WIDE_TEXTS if kind != "characters" else []):
        if kind == "characters" and "\t" in text:
            continue
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(table[token] for token in token_ids)
        assert joined.lstrip(b" ") == text.encode().lstrip(b" "), "but for the space that sentencepiece puts first"


@pytest.mark.parametrize("kind", KINDS)
def test_special_and_padding_ids_are_no_text(kind, tmp_path):
    tokenizer = make(kind, tmp_path)
    table = token_bytes(tokenizer, len(tokenizer) + 5)
    assert table[-5:] == [b""] * 5
    assert all(table[token] == b"" for token in tokenizer.all_special_ids)
    assert all(b"\xff" not in piece for piece in table)


def test_a_smaller_model_vocabulary_cuts_the_table(tmp_path):
    assert len(token_bytes(make("demo", tmp_path), 300)) == 300


def test_added_tokens_that_are_text_stand_for_themselves():
    tokenizer = byte_level()
    assert token_bytes(tokenizer, 400)[tokenizer.convert_tokens_to_ids("<think>")] == b"<think>"


def test_byte_tokens_are_bytes_and_marks_are_spaces():
    tokenizer = sentencepiece()
    table = token_bytes(tokenizer, 500)
    assert table[tokenizer.convert_tokens_to_ids("<0xE3>")] == b"\xe3"
    assert table[tokenizer.convert_tokens_to_ids("<0xFF>")] == b"", "no text has this byte"
    assert table[tokenizer.convert_tokens_to_ids("▁the")] == b" the"


def test_a_tokenizer_that_joins_in_other_ways_is_refused():
    with pytest.raises(RequestError, match="does not understand"):
        token_bytes(word_piece(), 10)
