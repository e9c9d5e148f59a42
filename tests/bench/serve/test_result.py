"""The usual table and JSON keys of serving benchmarks, and the arithmetic behind them."""

from __future__ import annotations

import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.bench.serve.answer import StreamedAnswer, StreamMeter
from ulysses_infer.bench.serve.load import LoadRun
from ulysses_infer.bench.serve.result import (
    num_within,
    peak_concurrency,
    peak_tokens_per_second,
    percentile,
    remarks,
    result_of,
    table,
)

KEYS = """duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput
output_throughput total_token_throughput mean_ttft_ms median_ttft_ms std_ttft_ms p99_ttft_ms mean_tpot_ms
median_tpot_ms std_tpot_ms p99_tpot_ms mean_itl_ms median_itl_ms std_itl_ms p99_itl_ms mean_e2el_ms median_e2el_ms
std_e2el_ms p99_e2el_ms input_lens output_lens ttfts itls start_times errors"""

TABLE = """\
============ Serving Benchmark Result ============
Successful requests:                     2
Failed requests:                         1
Maximum request concurrency:             8
Request rate configured (RPS):           4.00
Benchmark duration (s):                  2.00
Total input tokens:                      20
Total generated tokens:                  6
Request throughput (req/s):              1.00
Request goodput (req/s):                 0.50
Output token throughput (tok/s):         3.00
Peak output token throughput (tok/s):    6.00
Peak concurrent requests:                2.00
Total token throughput (tok/s):          13.00
---------------Time to First Token----------------
Mean TTFT (ms):                          300.00
Median TTFT (ms):                        300.00
P50 TTFT (ms):                           300.00
P99.9 TTFT (ms):                         399.80
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          150.00
Median TPOT (ms):                        150.00
P50 TPOT (ms):                           150.00
P99.9 TPOT (ms):                         199.90
---------------Inter-token Latency----------------
Mean ITL (ms):                           150.00
Median ITL (ms):                         150.00
P50 ITL (ms):                            150.00
P99.9 ITL (ms):                          200.00
----------------End-to-end Latency----------------
Mean E2EL (ms):                          600.00
Median E2EL (ms):                        600.00
P50 E2EL (ms):                           600.00
P99.9 E2EL (ms):                         799.60
=================================================="""


def answer(sent: float, ttft: float, gap: float, late: float = 0.0) -> StreamedAnswer:
    """Three tokens."""
    return StreamedAnswer(
        scheduled=sent - late,
        due=sent - late,
        sent=sent,
        first_token=sent + ttft,
        ended=sent + ttft + 2 * gap,
        gaps=[gap, gap],
        prompt_tokens=10,
        output_tokens=3,
        finish_reason="length",
    )


def run() -> LoadRun:
    failed = StreamedAnswer(scheduled=11.5, due=11.5, sent=11.5, ended=12.0, error="HTTP 503: full")
    return LoadRun(10.0, 12.0, [answer(10.0, 0.2, 0.1), answer(10.1, 0.4, 0.2), failed], [0.001], 0.003, 2)


def test_table_has_the_usual_lines() -> None:
    result = result_of(run(), {"ttft": 300, "tpot": 150}, [50, 99.9])

    lines = table(result, max_concurrency=8, rate=4.0).splitlines()

    assert [line.rstrip() for line in lines] == TABLE.splitlines()
    assert {len(line) for line in lines} == {50, 51}  # values are padded to ten characters


def test_lines_of_metrics_not_requested_are_left_out() -> None:
    text = table(result_of(run(), {}, [99]))

    assert "goodput" not in text
    assert "rate configured" not in text
    assert "Maximum request" not in text
    assert "P99 E2EL (ms):" in text


def test_json_has_the_usual_keys() -> None:
    result = json.loads(json.dumps(result_of(run(), {}, [99])))

    assert set(KEYS.split()) <= set(result)
    assert result["output_lens"] == [3, 3, 0]
    assert result["errors"] == ["", "", "HTTP 503: full"]
    assert result["start_times"] == pytest.approx([0.0, 0.1, 1.5])
    assert result["itls"] == [[0.1, 0.1], [0.2, 0.2], []]
    assert result["client"]["cpu_us_per_token"] == pytest.approx(500)


def test_run_without_one_success_has_a_table_too() -> None:
    result = result_of(LoadRun(1.0, 2.0, [StreamedAnswer(error="x", ended=2.0)]), {"ttft": 5}, [99])

    assert (result["completed"], result["failed"], result["request_goodput"]) == (0, 1, 0.0)
    assert "Mean TTFT (ms):                          0.00" in table(result)


def test_failures_are_counted_by_their_message() -> None:
    answers = [StreamedAnswer(error=error) for error in ["full"] * 3 + ["lost"] * 2 + ["a", "b", "c"]]
    lines = remarks(result_of(LoadRun(0.0, 1.0, answers), {}, [99]))

    assert lines[-4:-2] == ["failed, 3 x: full", "failed, 2 x: lost"]
    assert lines[-1] == "failed: 2 more kinds of errors; see errors in --result-file"


def test_lateness_of_the_client_is_reported() -> None:
    done = LoadRun(0.0, 1.0, [answer(0.5, 0.1, 0.1, late=0.04)], [0.0, 0.05])
    lines = remarks(result_of(done, {}, [99]))

    assert "late by 40.0 ms on average, 40.0 at most" in lines[0]
    assert "lower than specified" in lines[1]
    assert "latencies are too high" in lines[2]


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50))
def test_percentiles_interpolate(values: list[float]) -> None:
    values.sort()

    assert percentile(values, 50) == pytest.approx(statistics.median(values))
    assert percentile(values, 0) == values[0]
    assert percentile(values, 100) == values[-1]
    assert percentile(values, 25) == pytest.approx(statistics.quantiles(values, n=4, method="inclusive")[0])


def test_goodput_requires_every_limit_to_be_kept() -> None:
    answers = [answer(0, 0.2, 0.1), answer(0, 0.4, 0.1), answer(0, 0.2, 0.3)]

    assert num_within(answers, {"ttft": 300}) == 2
    assert num_within(answers, {"ttft": 300, "tpot": 200}) == 1
    assert num_within(answers, {"e2el": 799}) == 2


def test_peaks_are_tokens_in_one_second_and_requests_at_one_time() -> None:
    # tokens at 0.9, 1.0, 1.1 and at 1.5, 1.8, 2.1
    answers = [answer(0.5, 0.4, 0.101), answer(1.0, 0.5, 0.3)]

    assert peak_tokens_per_second(answers, 0.0) == 4
    assert peak_concurrency(answers) == 2
    assert peak_concurrency([answer(0.0, 0.1, 0.1), answer(0.31, 0.1, 0.1)]) == 1


def stream(*chunks: object) -> StreamedAnswer:
    """The meter's result for chunks that arrive one second apart."""
    meter = StreamMeter(StreamedAnswer())
    for moment, chunk in enumerate(chunks, 1):
        meter.take(b"[DONE]" if chunk == "[DONE]" else json.dumps(chunk).encode(), float(moment))
    meter.end(99.0)
    return meter.answer


def test_role_and_closing_chunks_are_not_tokens() -> None:
    deltas = [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": ""}, {"content": "b"}]
    chunks = [{"choices": [{"delta": delta}]} for delta in deltas]
    found = stream(*chunks, {"choices": [{"delta": {}, "finish_reason": "stop"}]}, "[DONE]")

    assert found.error is None
    assert found.first_token == 2.0
    assert found.gaps == [1.0, 1.0]  # the token without text counts
    assert found.ended == 5.0
    assert found.output_tokens == 3


def test_reasoning_and_tool_calls_are_tokens() -> None:
    deltas = [{"reasoning_content": "hm"}, {"tool_calls": [{"index": 0}]}]
    found = stream(*({"choices": [{"delta": delta}]} for delta in deltas))

    assert found.output_tokens == 2


def test_last_token_may_come_with_the_end() -> None:
    found = stream({"choices": [{"text": "a"}]}, {"choices": [{"text": "b", "finish_reason": "length"}]}, "[DONE]")

    assert (found.error, found.gaps, found.ended) == (None, [1.0], 2.0)


def test_usage_overrides_the_count_of_chunks() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
    found = stream({"choices": [{"text": "abc", "finish_reason": "stop"}]}, {"choices": [], "usage": usage}, "[DONE]")

    assert (found.prompt_tokens, found.output_tokens, found.cached_tokens) == (9, 5, 4)


def test_first_of_several_reasons_counts() -> None:
    assert stream({"error": {"message": "rank 1\ndied"}}, "[DONE]").error == "rank 1 died"
