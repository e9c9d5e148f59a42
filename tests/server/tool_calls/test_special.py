"""Tags that are special tokens are read by the parser and not shown."""

import itertools
import re

import pytest
from formats import RENDER, TOOLS
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.server.http.tool_use import CallReader
from ulysses_infer.server.tool_calls import FORMATS, special_tags
from ulysses_infer.server.tool_calls.special import RemovedTexts, TextRemover

CALLS = [("get_weather", {"city": "Bern", "days": 3}), ("now", {})]
OTHERS = {"<|end|>": [3], "<|endoftext|>": [4], "": [5]}


def read(name, text, cuts):
    special = special_tags(FORMATS[name], {**{tag: [9] for tag in FORMATS[name].tags}, **OTHERS})
    reader = CallReader(FORMATS[name].parser(TOOLS), True, special)
    edges = [0, *cuts, len(text)]
    content, names, arguments = "", [], {}
    for start, end in itertools.pairwise(edges):
        delta = reader.read(text[start:end], end == len(text) and start == edges[-2])
        content += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            names += [call["function"]["name"]] if "name" in call["function"] else []
            arguments[call["index"]] = arguments.get(call["index"], "") + call["function"]["arguments"]
    return content, names, arguments


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_calls_are_read_and_no_special_token_is_shown(name):
    text = RENDER[name](CALLS)
    for cuts in ((), range(1, len(text))):
        content, names, _ = read(name, text, cuts)
        assert (content, names) == ("", ["get_weather", "now"])
    tags = "".join(FORMATS[name].tags)
    text = f"Well<|end|>{tags} then.<|endoftext|>"
    for cuts in ((), range(1, len(text))):
        assert read(name, text, cuts)[:2] == ("Well then.", [])


def test_tokenizers_without_special_tags_need_nothing():
    assert special_tags(FORMATS["hermes"], OTHERS) is None
    assert special_tags(FORMATS["hermes"], {"<tool_call>": [7], **OTHERS}).tags == {"<tool_call>": [7]}


@given(st.lists(st.sampled_from(["<a>", "<ab>", "<", "a", ">", "<a", "b"]), max_size=12), st.data())
def test_texts_are_removed_however_they_are_cut(pieces, data):
    text = "".join(pieces)
    removed = RemovedTexts(["<a>", "<ab>"])
    whole = TextRemover(removed).feed(text, True)
    remover, output, position = TextRemover(removed), "", 0
    while position < len(text):
        size = data.draw(st.integers(1, len(text)))
        output += remover.feed(text[position : position + size], False)
        position += size
    assert output + remover.feed("", True) == whole
    assert whole == re.sub("<ab?>", "", text)
