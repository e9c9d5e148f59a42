"""Bad words: the text that the user would read decides, however it is split into tokens."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.text.bad_words import BadWords, Spellings

WORDS = ["he", "llo", "hello", " hello", "l", "o", "hel", " ", "class", "ass", "a", "s", "lo,", "lo!x", "lox"]
PIECES = ["", *WORDS, "\n", "\n\n"]
TOKENS = [*(piece.encode() for piece in PIECES), b"\xc3", b"\xa9", "é".encode()]
SPELLINGS = Spellings(TOKENS)


def ids(*pieces):
    return [TOKENS.index(piece if isinstance(piece, bytes) else piece.encode()) for piece in pieces]


def forbidden(words, output=()):
    return {TOKENS[token] for token in BadWords((), words, SPELLINGS).completing(ids(*output))}


@pytest.mark.parametrize(
    ("output", "completing"),
    [
        ([], {b"hello", b" hello"}),
        (["he"], {b"hello", b" hello", b"llo"}),
        (["hel"], {b"hello", b" hello", b"lo,", b"lo!x"}),  # not "lox": there the word continues
        ([" ", "hel", "l"], {b"hello", b" hello", b"o"}),
        (["a", "he"], {b"hello", b" hello", b"llo"}),  # it begins where a token does
    ],
)
def test_every_way_to_spell_a_word_is_forbidden(output, completing):
    assert forbidden(["hello"], output) == completing


def test_a_part_of_a_longer_word_is_not_a_bad_word():
    assert forbidden(["ass"]) == {b"ass"}
    assert forbidden(["\n"]) == {b"\n", b"\n\n"}


def test_a_word_that_begins_with_a_space_is_forbidden_as_it_is():
    assert forbidden([" hello"]) == {b" hello"}
    assert forbidden([" hello"], [" ", "hel"]) == {b" hello", b"lo,", b"lo!x"}
    assert forbidden([" hello"], [" ", "he"]) == {b" hello", b"llo"}


def test_bytes_that_spell_a_character_are_its_text():
    assert forbidden(["é"]) == {"é".encode()}
    assert forbidden(["é"], [b"\xc3"]) == {"é".encode(), b"\xa9"}


def test_a_word_is_a_whole_word_wherever_it_is_in_a_token():
    tokens = [b"x", b"a-b", b"xa-b", b"a-bx", b" a-b.", b"a-ba-b", b"xa-b a-b", b"-", b"a--b", b"(", "aé".encode()]
    forbidden = BadWords((), ["a-b", "-"], Spellings(tokens)).completing([]).tolist()
    assert [tokens[token] for token in forbidden] == [piece for piece in tokens if b"-" in piece]
    forbidden = BadWords((), ["a-b", "a"], Spellings(tokens)).completing([]).tolist()
    assert [tokens[token] for token in forbidden] == [b"a-b", b"a-bx", b" a-b.", b"a-ba-b", b"xa-b a-b", b"a--b"]


def test_many_words_cost_microseconds_per_token():
    letters = range(ord("a"), ord("z") + 1)
    tokens = [bytes(spelled) for spelled in itertools.product(letters, repeat=3)]
    spelled = itertools.islice(itertools.permutations(letters, 6), 500)
    words = ["".join(map(chr, word)) for word in spelled]
    bad_words = BadWords((), words, Spellings(tokens))
    output = [tokens.index(b"xyz"), tokens.index(b"abc")]
    started = time.process_time()
    for _ in range(100):
        found = bad_words.completing(output)
    assert time.process_time() - started < 0.05  # half a millisecond per token; it takes some ten microseconds
    assert len(found) == len({word[3:] for word in words})


def test_a_word_of_any_length_is_forbidden():
    word = "helo" * 20_000 + " lo"
    output = ids("hel", "o") * 20_000 + ids(" ")
    assert {TOKENS[token] for token in BadWords((), [word], SPELLINGS).completing(output)} == {b"lo,", b"lo!x"}


def test_sequences_hold_where_the_bytes_are_not_known():
    words = BadWords([[7], [5, 6, 8]])
    assert words.completing([]).tolist() == [7]
    assert words.completing([1, 5, 6]).tolist() == [7, 8]


@given(st.lists(st.integers(1, len(TOKENS) - 1), max_size=12), st.sampled_from(["hello", " hello", "é", "ass", "lo"]))
def test_what_is_left_never_spells_the_word_in_whole_tokens(output, word):
    words, kept = BadWords((), [word], SPELLINGS), []
    for token in output:
        if token not in words.completing(kept):
            kept.append(token)
    for start in range(len(kept)):
        for stop in range(start + 1, len(kept) + 1):
            assert b"".join(TOKENS[token] for token in kept[start:stop]) != word.encode()
