"""Datasets of requests: random prompts, shared prefixes, files, traces."""

from __future__ import annotations

import asyncio
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.serve.fake_server import FakeServer
from ulysses_infer.bench.serve.client import Client, Server
from ulysses_infer.bench.serve.datasets import (
    custom_items,
    prefix_items,
    random_items,
    sharegpt_items,
    take,
    trace_items,
)
from ulysses_infer.bench.serve.traces import TraceRow, read_trace
from ulysses_infer.bench.serve.vocabulary import PromptVocabulary, ask_vocabulary
from ulysses_infer.errors import ConfigError

IDS = PromptVocabulary(range(100))
TEXT = PromptVocabulary((), tokens_per_word=2.0)


def conversation(*turns: str) -> dict[str, Any]:
    return {"conversations": [{"from": "x", "value": turn} for turn in turns]}


@given(st.integers(1, 200), st.integers(1, 200), st.floats(0, 0.99), st.integers(0, 99))
def test_random_lengths_stay_within_their_range(input_len: int, output_len: int, ratio: float, seed: int) -> None:
    for item in islice(random_items(IDS, input_len, output_len, ratio, seed), 20):
        assert max(1, round(input_len * (1 - ratio))) <= len(item.content) <= round(input_len * (1 + ratio))
        assert max(1, round(output_len * (1 - ratio))) <= item.output_len <= round(output_len * (1 + ratio))


def test_prompts_repeat_with_their_seed_alone() -> None:
    first, again, other = (take(random_items(IDS, 10, 5, 0.0, seed), 3) for seed in (1, 1, 2))

    assert first == again
    assert first != other
    assert first[0] != first[1]


def test_text_has_about_the_requested_number_of_tokens() -> None:
    (item,) = take(random_items(TEXT, 60, 5, 0.0, 0), 1)

    assert isinstance(item.content, str)
    assert len(item.content.split()) == 30


def test_prompts_share_prefixes_evenly() -> None:
    items = take(prefix_items(IDS, 20, 5, 3, 7, 0), 9)

    prefixes = [tuple(item.content[:20]) for item in items]
    assert {len(item.content) for item in items} == {25}
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [3, 3, 3]


def test_custom_file_has_prompts_and_messages(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": "a", "max_tokens": 3},
        {"messages": messages, "max_tokens": 4},
        {"prompt": [1], "output_tokens": 2},
    ]
    file.write_text("\n\n".join(map(json.dumps, rows)))

    assert [(item.content, item.output_len) for item in custom_items(file, None)] == [("a", 3), (messages, 4), ([1], 2)]
    assert {item.output_len for item in custom_items(file, 9)} == {9}


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"prompt": ""}', '{"prompt": "x"}', '{"prompt": "x", "max_tokens": 0}']
)
def test_wrong_line_of_a_custom_file_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "x", "max_tokens": 3}\n' + line)

    with pytest.raises(ConfigError, match="line 2"):
        custom_items(file, None)


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        custom_items(tmp_path / "none", 1)


def test_sharegpt_takes_first_questions_of_usual_length(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    rows = [
        conversation("a question", "an answer", "more"),
        conversation("hi", "too short a question"),
        conversation("no answer"),
        conversation("long" * 500, "too long a question"),
        {"id": 3},
        conversation("", "x"),
    ]
    file.write_text(json.dumps(rows))

    async def read() -> list[Any]:
        async with FakeServer() as server:
            client = Client(Server.of(server.url))
            return await sharegpt_items(file, 10, None, client, "fake", 0)

    items = asyncio.run(read())
    assert [(item.content, item.output_len) for item in items] == [("a question", len("an answer"))]


def test_mooncake_trace_is_read_in_seconds(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}\n'
        '{"timestamp": 1500, "input_length": 10, "output_length": 6, "hash_ids": [0]}\n'
    )

    assert read_trace(file) == [TraceRow(0.0, 10, 6, (0,)), TraceRow(1.5, 600, 5, (0, 7))]


def test_azure_trace_is_read_across_midnight(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 23:59:59.9799600,4808,10\n2023-11-17 00:00:01,3180,8\n"
    )

    rows = read_trace(file)
    assert [(row.input_len, row.output_len) for row in rows] == [(4808, 10), (3180, 8)]
    assert rows[1].at == pytest.approx(1.02004, abs=1e-6)


@pytest.mark.parametrize(("name", "text"), [("x.csv", "A,B\n1,2\n"), ("x.jsonl", '{"timestamp": 1}\n'), ("x.csv", "")])
def test_file_that_is_not_a_trace_is_refused(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)

    with pytest.raises(ConfigError, match=name):
        read_trace(file)


@pytest.mark.parametrize("vocabulary", [IDS, TEXT])
def test_prompts_of_a_trace_share_what_their_hash_ids_share(vocabulary: PromptVocabulary) -> None:
    rows = [TraceRow(0, 1000, 1, (5, 6)), TraceRow(1, 1024, 1, (5, 7)), TraceRow(2, 1500, 1, (5, 6)), TraceRow(3, 9, 0)]
    first, second, third, fourth = trace_items(rows, vocabulary, seed=1)

    units = [item.content.split() if isinstance(item.content, str) else item.content for item in (first, second, third)]
    block, whole = vocabulary.num_units(512), vocabulary.num_units(1000)
    assert units[0][:block] == units[1][:block]
    assert units[0][block:whole] != units[1][block:whole]
    assert units[2][:whole] == units[0]
    assert [len(own) for own in units] == [vocabulary.num_units(row.input_len) for row in rows[:3]]
    assert (fourth.at, fourth.output_len) == (3, 1)


@pytest.mark.parametrize(
    ("has_tokenizer", "is_text", "vocab_size", "ids"),
    [(True, False, None, True), (True, True, None, False), (False, False, None, False), (False, False, 50, True)],
)
def test_token_ids_are_those_the_tokenizer_makes(
    has_tokenizer: bool, is_text: bool, vocab_size: int | None, ids: bool
) -> None:
    async def ask() -> PromptVocabulary:
        async with FakeServer(has_tokenizer=has_tokenizer) as server:
            return await ask_vocabulary(Client(Server.of(server.url)), "fake", is_text, vocab_size)

    vocabulary = asyncio.run(ask())
    assert bool(vocabulary.ids) == ids
    if has_tokenizer:
        assert vocabulary.tokens_per_word == pytest.approx(5, abs=0.01)  # four letters and a space
        assert not ids or set(vocabulary.ids) <= {ord(character) for character in " abcdefghijklmnopqrstuvwxyz"}


def test_too_few_requests_are_reported() -> None:
    with pytest.raises(ConfigError, match="only 0 requests"):
        take([], 3)
