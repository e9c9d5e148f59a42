"""Tags that are special tokens are read by the parser and not shown."""

import itertools
import re

import pytest
from formats import RENDER, TOOLS
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.server.http.output_reader import OutputReader
from ulysses_infer.server.http.outputs import Delta
from ulysses_infer.server.tool_calls import FORMATS, CallStarted, ContentDelta, special_tags
from ulysses_infer.server.tool_calls.special import RemovedTexts, TextRemover

CALLS = [("get_weather", {"city": "Bern", "days": 3}), ("now", {})]
OTHERS = {"<|end|>": [3], "<|endoftext|>": [4], "": [5]}


def read(name, text, cuts):
    special = special_tags(FORMATS[name].tags, {**{tag: [9] for tag in FORMATS[name].tags}, **OTHERS})
    reader = OutputReader(tools=FORMATS[name].parser(TOOLS), special=special, calls=True)
    edges = [0, *cuts, len(text)]
    events = []
    for start, end in itertools.pairwise(edges):
        is_last = end == len(text) and start == edges[-2]
        events += reader.read(Delta([(text[start:end], 0)], [], "stop" if is_last else None, None))
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    names = [event.name for event in events if isinstance(event, CallStarted)]
    return content, names


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_calls_are_read_and_no_special_token_is_shown(name):
    text = RENDER[name](CALLS)
    for cuts in ((), range(1, len(text))):
        content, names = read(name, text, cuts)
        assert (content, names) == ("", ["get_weather", "now"])
    tags = "".join(FORMATS[name].tags)
    text = f"Well<|end|>{tags} then.<|endoftext|>"
    for cuts in ((), range(1, len(text))):
        assert read(name, text, cuts) == ("Well then.", [])


def test_tokenizers_without_special_tags_need_nothing():
    assert special_tags(FORMATS["hermes"].tags, OTHERS) is None
    assert special_tags(FORMATS["hermes"].tags, {"<tool_call>": [7], **OTHERS}).tags == {"<tool_call>": [7]}


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
