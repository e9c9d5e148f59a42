"""The arithmetic and the order of offline benchmarks."""

from __future__ import annotations

import statistics

import pytest

from ulysses_infer.bench.offline import check_modes, for_benchmark
from ulysses_infer.bench.report import as_json, comparison, summarize
from ulysses_infer.bench.workload import Sample, Workload, sample_of
from ulysses_infer.config import CacheConfig, Config, ParallelConfig
from ulysses_infer.errors import ConfigError
from ulysses_infer.outputs import CompletionOutput, RequestMetrics, RequestOutput


def sample(ttft: float, seconds: float = 1.0) -> Sample:
    return Sample(ttft=ttft, tpot=ttft / 10, seconds=seconds, output_tokens=10, total_tokens=30)


def test_median_ignores_one_disturbed_repeat() -> None:
    summary = summarize({"tp": [1.0, 9.0, 2.0], "sp": [4.0, 4.0, 4.0]}, higher_is_better=False)

    assert (summary["tp"].median, summary["tp"].low, summary["tp"].high) == (2.0, 1.0, 9.0)
    assert (summary["tp"].ratio, summary["sp"].ratio) == (1.0, 2.0)


def test_best_is_the_highest_where_higher_is_better() -> None:
    summary = summarize({"tp": [50.0], "sp": [100.0]}, higher_is_better=True)

    assert (summary["tp"].ratio, summary["sp"].ratio) == (0.5, 1.0)


def test_sample_comes_from_the_clocks_of_the_requests() -> None:
    def output(arrival: float, first: float, last: float) -> RequestOutput:
        metrics = RequestMetrics(arrival, arrival, first, last, last, num_output_tokens=3)
        return RequestOutput("r", None, [0] * 5, [CompletionOutput(0, "", [1, 2, 3])], True, metrics=metrics)

    measured = sample_of([output(0.0, 1.0, 3.0), output(0.5, 3.5, 7.5)])

    assert measured == Sample(ttft=2.0, tpot=1.5, seconds=7.5, output_tokens=6, total_tokens=16)


def test_no_mode_can_profit_from_the_cache_another_filled() -> None:
    config = for_benchmark(Config(), Workload(input_len=20, output_len=5, num_prompts=3))

    assert not config.cache.enable_prefix_caching
    assert config.cache.num_blocks == 3 * 2  # 25 tokens take two blocks of 16


def test_samples_share_prompts_that_no_other_mode_has_cached() -> None:
    workload = Workload(input_len=4, output_len=7, num_prompts=2, samples=3, tail=1.0)
    prompts = workload.prompts(0, 100, "tp")
    assert [prompts[0]] * 3 + [prompts[3]] * 3 == prompts
    assert not any(prompt in workload.prompts(0, 100, "sp") for prompt in prompts)
    assert for_benchmark(Config(), workload).cache.enable_prefix_caching


def test_output_lengths_have_a_tail_and_are_those_of_every_mode() -> None:
    workload = Workload(input_len=4, output_len=20, num_prompts=50, samples=4, tail=1.0)
    lengths = workload.output_lens(0)
    assert lengths == workload.output_lens(0) != workload.output_lens(1)
    assert sorted(workload.output_lens(1)) == sorted(lengths) == workload.sorted_output_lens
    assert len(lengths) == 200
    assert 1 <= min(lengths) < 20 < max(lengths) <= 160
    assert 15 <= statistics.median(lengths) <= 26
    assert set(Workload(4, 20, 5).output_lens(0)) == {20}


def test_cache_that_was_asked_for_is_kept() -> None:
    asked = Config(cache=CacheConfig(num_blocks=99))

    assert for_benchmark(asked, Workload(20, 5, 3)).cache.num_blocks == 99


def test_modes_need_ranks() -> None:
    check_modes(["single"], Config())
    check_modes(["tp", "single"], Config(parallel=ParallelConfig(sp=2)))
    with pytest.raises(ConfigError, match=r"mode tp needs more than one rank; add parallel\.sp=2"):
        check_modes(["single", "tp"], Config())


def test_table_has_one_row_per_mode_and_marks_the_best() -> None:
    samples = {"tp": [sample(0.010)], "sp": [sample(0.020)]}

    table = comparison("latency", samples, {"tp": "tp", "sp": "sp"})

    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    assert columns[0] == ["tp", "sp"]
    assert columns[1] == ["10.0", "20.0"]
    assert columns[3] == ["1.00x", "2.00x"]


def test_json_has_every_repeat_and_the_median() -> None:
    record = as_json("throughput", {"tp": [sample(1.0, seconds=2.0), sample(1.0, seconds=3.0)]})

    assert record["tp"]["total_token_throughput"] == [15.0, 10.0]
    assert record["tp"]["median_total_token_throughput"] == 12.5
    assert record["tp"]["total_token_throughput_of_best"] == 1.0
