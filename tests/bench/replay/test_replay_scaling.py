"""Windows, scales, and prompts that share what the trace says they share."""

from __future__ import annotations

import random
from itertools import pairwise, takewhile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.bench.replay.replay_bench import shared_tokens
from ulysses_infer.bench.replay.scaling import Scale, Window, paper_window, thinned
from ulysses_infer.bench.serve.datasets import trace_items
from ulysses_infer.bench.serve.traces import HASH_BLOCK_TOKENS, TraceRow
from ulysses_infer.bench.serve.vocabulary import PromptVocabulary
from ulysses_infer.errors import ConfigError

IDS = PromptVocabulary(range(1000))
times = st.lists(st.floats(0, 3600), min_size=1, max_size=50)
scales = st.floats(0.002, 2)


def rows_at(moments: list[float]) -> list[TraceRow]:
    return [TraceRow(at, 10, 5) for at in sorted(moments)]


def common(first: list[int], second: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@given(times, st.floats(0, 50), st.floats(0.1, 60))
def test_a_window_has_exactly_the_rows_in_it_counted_from_its_start(moments, start, length):
    rows, end = rows_at(moments), start + length
    expected = [at for at in sorted(moments) if start * 60 <= at <= end * 60]
    if not expected:
        with pytest.raises(ConfigError, match="no requests from minute"):
            Window(start, end).cut(rows)
        return
    cut = Window(start, end).cut(rows)
    assert [row.at for row in cut] == [at - start * 60 for at in expected]
    assert all(0 <= row.at <= length * 60 + 1e-6 for row in cut)


def test_the_papers_windows_are_those_of_the_two_traces():
    assert paper_window(Path("azure.csv")) == Window(2, 17)
    assert paper_window(Path("mooncake.jsonl")) == Window(0, 15)
    with pytest.raises(ConfigError, match=r"not 'trace\.txt'"):
        paper_window(Path("trace.txt"))


@given(times, st.floats(0.01, 10))
def test_time_scales_linearly_and_keeps_the_order(moments, factor):
    rows = rows_at(moments)
    scaled = Scale(time=factor).apply(rows)
    assert [row.at for row in scaled] == [row.at * factor for row in rows]
    assert [(row.input_len, row.output_len) for row in scaled] == [(10, 5)] * len(rows)


@given(st.integers(1, 200_000), st.integers(0, 3000), scales, st.integers(1, 5000), st.integers(1, 500))
def test_lengths_are_scaled_then_limited_and_never_zero(input_len, output_len, factor, most_in, most_out):
    scale = Scale(length=factor, max_input_len=most_in, max_output_len=most_out)
    (row,) = scale.apply([TraceRow(0.0, input_len, output_len)])
    assert row.input_len == min(most_in, max(1, round(input_len * factor)))
    assert row.output_len == min(most_out, max(1, round(output_len * factor)))


def test_rows_that_the_limits_shorten_are_counted():
    rows = [TraceRow(0.0, 100, 10), TraceRow(0.0, 1000, 10), TraceRow(0.0, 100, 90)]
    assert Scale(length=0.5, max_input_len=50, max_output_len=40).num_shortened(rows) == 2


@given(st.integers(0, 6), st.integers(1, 6), st.integers(1, 6), scales, st.integers(0, 511), st.booleans())
def test_scaled_prompts_share_exactly_their_common_hash_ids(shared, more, others, factor, cut, is_text):
    """Up to chance: at the first token that is not shared two draws may agree."""
    first = tuple(range(shared)) + tuple(range(100, 100 + more))
    second = tuple(range(shared)) + tuple(range(200, 200 + others))
    rows = [TraceRow(0.0, len(ids) * HASH_BLOCK_TOKENS - cut, 4, ids) for ids in (first, second)]
    scale = Scale(length=factor)
    vocabulary = PromptVocabulary() if is_text else PromptVocabulary(range(2**30))
    items = trace_items(scale.apply(rows), vocabulary, 1, scale.block_tokens)
    units = [item.content.split() if is_text else item.content for item in items]
    expected = 0 if shared == 0 else vocabulary.num_units(round(shared * scale.block_tokens))
    expected = min(expected, *(len(prompt) for prompt in units))
    assert expected <= common(*units) <= expected + 2 * is_text


@given(st.lists(st.integers(0, 30), max_size=8), st.integers(1, 5000), scales)
def test_prompts_have_the_scaled_length_whatever_their_hash_ids(hash_ids, input_len, factor):
    scale = Scale(length=factor)
    (row,) = scale.apply([TraceRow(0.0, input_len, 4, tuple(hash_ids))])
    (item,) = trace_items([row], IDS, 1, scale.block_tokens)
    assert len(item.content) == row.input_len == max(1, round(input_len * factor))


def test_prompts_are_equal_in_every_replay_and_differ_with_another_seed():
    rows = [TraceRow(0.0, 700, 4, (3, 4)), TraceRow(1.0, 40, 4)]
    assert trace_items(rows, IDS, 1) == trace_items(rows, IDS, 1)
    pairs = zip(trace_items(rows, IDS, 1), trace_items(rows, IDS, 2), strict=True)
    assert all(first.content != second.content for first, second in pairs)


@given(times, st.integers(1, 60))
def test_thinning_keeps_the_given_number_of_rows_in_order_and_evenly(moments, count):
    rows = rows_at(moments)
    kept = thinned(rows, count)
    assert len(kept) == min(count, len(rows))
    assert kept[0] is rows[0]
    places = [index for index, row in enumerate(rows) if any(row is other for other in kept)]
    assert max((b - a for a, b in pairwise(places)), default=0) <= -(-len(rows) // count)


def test_what_came_before_is_counted_up_to_the_first_new_block():
    draw = random.Random(0).sample(range(100), 4)
    rows = [TraceRow(0.0, 30, 1, (1, 2, 3)), TraceRow(1.0, 25, 1, (1, 2, 9)), TraceRow(2.0, 5, 1, (1,))]
    rows.append(TraceRow(3.0, 40, 1, tuple(100 + number for number in draw)))
    assert shared_tokens(rows, 10) == 20 + 5
