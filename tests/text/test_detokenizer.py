import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.tokenizer_kinds import KINDS, tokenizer_of
from ulysses_infer.errors import RequestError
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.text.detokenizer import WINDOW, Detokenizer, StopMatcher, TokenDecoder


def detokenizer(kind: str, prompt=(), **params) -> Detokenizer:
    return Detokenizer(TokenDecoder(tokenizer_of(kind)), SamplingParams(**params), prompt)


def full_decode(kind: str, token_ids, skip_special_tokens=True) -> str:
    return tokenizer_of(kind).decode(
        token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


def encode(kind: str, text: str) -> list[int]:
    return tokenizer_of(kind).encode(text, add_special_tokens=False)


def pieces_of(detok: Detokenizer, token_ids) -> list[str]:
    return [*(detok.append([token_id]) for token_id in token_ids), detok.finish()]


def token_lists(kind: str):
    size = len(tokenizer_of(kind))
    return st.lists(st.integers(0, size - 1) | st.integers(0, min(size - 1, 20)), max_size=60)


texts = st.text(max_size=40) | st.lists(st.sampled_from("👩‍👧👍🏽你好e\u0301 \n.aéक्षि")).map("".join)


# --- text of all tokens ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_pieces_join_to_the_full_decoding_of_any_tokens(kind, skip_special_tokens, data):
    token_ids = data.draw(token_lists(kind))
    expected = full_decode(kind, token_ids, skip_special_tokens)
    detok = detokenizer(kind, skip_special_tokens=skip_special_tokens)
    given_out = ""
    for token_id in token_ids:
        given_out += detok.append([token_id])
        assert expected.startswith(given_out)
    assert given_out + detok.finish() == expected == detok.text


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@settings(deadline=None, max_examples=300)
@given(text=texts)
def test_any_text_comes_back_whole(kind, text):
    text = text.lstrip(" ")  # sentencepiece cannot tell its own first space
    token_ids = encode(kind, text)
    if full_decode(kind, token_ids) == text:  # not where the text spells a special token or ▁
        assert "".join(pieces_of(detokenizer(kind), token_ids)) == text


@settings(deadline=None, max_examples=200)
@given(text=texts)
def test_no_piece_of_byte_level_text_has_half_a_character_or_waits_longer_than_one(text):
    text = text.replace("\ufffd", "")  # one that the model means waits for the next token
    token_ids = encode("byte_level", text)
    detok = detokenizer("byte_level")
    for index, token_id in enumerate(token_ids):
        detok.append([token_id])
        so_far = full_decode("byte_level", token_ids[: index + 1])
        assert detok.text == (so_far if text.startswith(so_far) else so_far[:-1])


def test_emoji_is_given_out_in_one_piece():
    for kind in ("byte_level", "sentencepiece"):
        token_ids = encode(kind, "a🦜a")
        assert len(token_ids) > 4
        assert [piece for piece in pieces_of(detokenizer(kind), token_ids) if piece] in (
            ["a", "🦜", "a"],
            ["a", "🦜a"],
        )


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_unfinished_character_becomes_replacements_only_at_the_end(kind):
    token_ids = encode(kind, "a🦜")[:-1]
    detok = detokenizer(kind)
    assert detok.append(token_ids) == "a"
    assert detok.finish() == full_decode(kind, token_ids)[1:]
    assert "\ufffd" in detok.text


def test_wrong_byte_spoils_its_run_as_in_a_full_decoding():
    token_ids = [
        *encode("sentencepiece", "a好")[-3:],
        tokenizer_of("sentencepiece").convert_tokens_to_ids("<0xFF>"),
    ]
    assert full_decode("sentencepiece", token_ids) == "\ufffd" * 4
    assert "".join(pieces_of(detokenizer("sentencepiece"), token_ids)) == "\ufffd" * 4


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_tokens_can_come_in_any_groups(kind, data):
    token_ids = data.draw(token_lists(kind))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(token_ids)), max_size=5)))
    detok = detokenizer(kind, stop=["e", "你"])
    for start, stop in zip([0, *cuts], [*cuts, len(token_ids)], strict=True):
        detok.append(token_ids[start:stop])
    detok.finish()
    single = detokenizer(kind, stop=["e", "你"])
    assert detok.text == "".join(pieces_of(single, token_ids))
    assert detok.stop_reason == single.stop_reason


# --- special tokens and the prompt ---


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_skipped_or_shown(kind):
    tokenizer = tokenizer_of(kind)
    token_ids = [tokenizer.bos_token_id, 4, tokenizer.eos_token_id]
    assert "</s>" not in "".join(pieces_of(detokenizer(kind), token_ids))
    assert "</s>" in "".join(pieces_of(detokenizer(kind, skip_special_tokens=False), token_ids))


@pytest.mark.parametrize("kind", ["sentencepiece", "SlowTokenizer"])
def test_first_space_is_kept_after_text_and_dropped_after_a_special_token(kind):
    tokenizer = tokenizer_of(kind)
    word, prompt = {"sentencepiece": ("▁the", "▁quick"), "SlowTokenizer": ("▁a", "b")}[kind]
    word_id, prompt_id = tokenizer.convert_tokens_to_ids([word, prompt])
    after_text = detokenizer(kind, [tokenizer.bos_token_id, prompt_id])
    after_special = detokenizer(kind, [prompt_id, tokenizer.bos_token_id])
    assert after_text.append([word_id, word_id]) == f" {word[1:]} {word[1:]}"
    assert after_special.append([word_id, word_id]) == f"{word[1:]} {word[1:]}"


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_text_after_a_prompt_is_what_the_prompt_and_output_decode_to(kind, data):
    prompt = [4, *data.draw(token_lists(kind)), 5]
    output = [4, *data.draw(token_lists(kind))]
    whole, before = full_decode(kind, prompt + output), full_decode(kind, prompt)
    detok = detokenizer(kind, prompt)
    detok.append(output)
    detok.finish()
    if before and whole.startswith(before) and "\ufffd" not in whole:
        assert before + detok.text == whole


def test_prompt_that_ends_inside_a_character_lends_no_context():
    prompt = encode("byte_level", "a🦜")[:-1]
    assert detokenizer("byte_level", prompt).append(encode("byte_level", "ab")) == "ab"


@pytest.mark.parametrize("kind", ["byte_level", "SlowTokenizer"])
def test_padding_ids_of_the_vocabulary_give_no_text(kind):
    b, c = tokenizer_of(kind).convert_tokens_to_ids(["b", "c"])
    assert "".join(pieces_of(detokenizer(kind), [b, 10**5, c])) == "bc"


# --- cost ---


class CountingTokenizer:
    """Counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.num_decoded = 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, token_ids, **kwargs):
        self.num_decoded += len(token_ids)
        return self._tokenizer.decode(token_ids, **kwargs)


@pytest.mark.parametrize("stop", [None, ["zzz"]])
@pytest.mark.parametrize("garbage", [False, True])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_cost_per_token_does_not_grow_with_the_text(kind, garbage, stop):
    tokenizer = CountingTokenizer(tokenizer_of(kind))
    byte = tokenizer.convert_tokens_to_ids({"byte_level": "Ģ", "sentencepiece": "<0x80>"}[kind])
    token_ids = [byte] * 3000 if garbage else encode(kind, "the 你é quick\n" * 500)[:3000]
    detok = Detokenizer(TokenDecoder(tokenizer), SamplingParams(stop=stop))
    tokenizer.num_decoded = 0
    assert "".join(pieces_of(detok, token_ids)) == full_decode(kind, token_ids)
    assert tokenizer.num_decoded <= len(token_ids) * WINDOW * 6


# --- stop strings ---


def expected_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The stop string whose end comes first, the longest of those with the same end."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(deadline=None, max_examples=300)
@given(
    text=st.text("ab你 ", max_size=30),
    stops=st.lists(st.text("ab你 ", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_text_ends_at_the_stop_string_that_is_complete_first(text, stops, include):
    detok = detokenizer("byte_level", stop=stops, include_stop_str_in_output=include)
    halves = {stop[:length] for stop in stops for length in range(len(stop))} | {""}
    given_out, token_ids = "", encode("byte_level", text)
    for index, token_id in enumerate(token_ids):
        given_out += detok.append([token_id])
        if detok.stop_reason is None:
            certain = full_decode("byte_level", token_ids[: index + 1]).rstrip("\ufffd")
            half = max((half for half in halves if certain.endswith(half)), key=len)
            assert given_out + half == certain
    given_out += detok.finish()
    assert (given_out, detok.stop_reason) == expected_stop(text, list(dict.fromkeys(stops)), include)


def test_stop_string_over_several_tokens_is_never_half_given_out():
    token_ids = encode("byte_level", "xx<|end|>yy")
    assert len(token_ids) > 5
    detok = detokenizer("byte_level", stop="<|end|>")
    pieces = pieces_of(detok, token_ids)
    assert ("".join(pieces), detok.stop_reason) == ("xx", "<|end|>")
    assert not any("<" in piece for piece in pieces)


def test_false_start_of_a_stop_string_is_given_out_when_it_fails_or_at_the_end():
    detok = detokenizer("byte_level", stop="ENDING")
    assert [detok.append(encode("byte_level", part)) for part in ("x", "END", "x", "EN")] == [
        "x",
        "",
        "ENDx",
        "",
    ]
    assert detok.finish() == "EN"
    assert detok.stop_reason is None
    assert detok.finish() == ""


def test_tokens_after_a_stop_string_are_ignored():
    detok = detokenizer("byte_level", stop="b")
    assert detok.append(encode("byte_level", "abc")) == "a"
    assert detok.append(encode("byte_level", "d")) == ""
    assert (detok.finish(), detok.text) == ("", "a")


def test_stop_string_counts_only_after_min_tokens():
    letters = [encode("byte_level", letter)[0] for letter in "xyxy"]
    detok = detokenizer("byte_level", stop=["xy"], min_tokens=2)
    assert "".join(pieces_of(detok, letters)) == "xy"
    assert detok.stop_reason == "xy"
    straddling = detokenizer("byte_level", stop=["yx"], min_tokens=2)
    assert "".join(pieces_of(straddling, letters)) == "x"  # begun before, complete after
    late = detokenizer("byte_level", stop=["xy"], min_tokens=4)
    assert ("".join(pieces_of(late, letters)), late.stop_reason) == ("xyxy", None)


def test_stop_string_in_held_bytes_is_found():
    detok = detokenizer("sentencepiece", stop=["好"])
    assert detok.append(encode("sentencepiece", "a好")) == "a"
    assert detok.finish() == ""
    assert detok.stop_reason == "好"


@given(text=st.text("ab", max_size=40), stop=st.text("ab", min_size=1, max_size=6))
def test_matcher_finds_every_occurrence(text, stop):
    matcher = StopMatcher([stop])
    for end in range(1, len(text) + 1):
        found = matcher.feed(text[end - 1])
        assert (found == stop) == text[:end].endswith(stop)
        longest = max(n for n in range(len(stop)) if text[:end].endswith(stop[:n]))
        assert matcher.num_held == longest


# --- without text ---


def test_without_detokenization_the_text_is_empty():
    assert pieces_of(Detokenizer(None, SamplingParams()), [1, 2]) == ["", "", ""]
    assert pieces_of(detokenizer("byte_level", detokenize=False), [70, 71]) == ["", "", ""]


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(RequestError, match="tokenizer"):
        Detokenizer(None, SamplingParams(stop="x"))


# --- what the user sees decides ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_that_is_skipped_can_be_a_stop_string(kind):
    hello, special = [len(tokenizer_of(kind)) - 2], tokenizer_of(kind).eos_token_id
    detok = detokenizer(kind, stop=["</s>"])
    detok.append([*hello, special, *hello])
    assert (detok.stop_reason, detok.text) == ("</s>", full_decode(kind, hello))


@pytest.mark.parametrize(("include", "text"), [(False, "the "), (True, "the quick</s>fox")])
def test_a_stop_string_may_span_text_and_skipped_tokens(include, text):
    kind = "byte_level"
    detok = detokenizer(kind, stop=["quick</s>fox"], include_stop_str_in_output=include)
    detok.append([*encode(kind, "the quick"), tokenizer_of(kind).eos_token_id, *encode(kind, "fox"), 7])
    assert (detok.stop_reason, detok.text) == ("quick</s>fox", text)


def test_a_skipped_token_that_no_stop_string_contains_is_not_seen():
    kind = "byte_level"
    detok = detokenizer(kind, stop=["s>", "quickfox"])
    detok.append([*encode(kind, "the quick"), tokenizer_of(kind).eos_token_id, *encode(kind, "fox")])
    assert (detok.stop_reason, detok.text) == ("quickfox", "the ")


def test_a_false_start_with_a_skipped_token_gives_out_what_is_seen():
    kind = "byte_level"
    detok = detokenizer(kind, stop=["</s>fox"])
    detok.append([*encode(kind, "quick"), tokenizer_of(kind).eos_token_id, *encode(kind, " brown")])
    assert detok.finish() == ""
    assert (detok.stop_reason, detok.text) == (None, "quick brown")


def test_a_stop_string_of_byte_tokens_ends_the_output_at_its_last_byte():
    first = 3 + 0xF0
    emoji = [3 + byte for byte in "👍".encode()]
    assert emoji[0] == first
    detok = detokenizer("sentencepiece", stop=["👍"])
    assert [detok.append([token]) for token in emoji] == [""] * 4
    assert (detok.stop_reason, detok.text) == ("👍", "")


def test_ids_that_the_tokenizer_does_not_know_have_no_text():
    decoder = TokenDecoder(tokenizer_of("SlowTokenizer"))
    assert [decoder.text_of(token) for token in (-1, 4, 10**6)] == ["", full_decode("SlowTokenizer", [4]), ""]
    assert not decoder.is_visible(10**6, False)
