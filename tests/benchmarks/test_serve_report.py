"""The arithmetic of benchmarks/serve_report.py; its measurements need minutes and a quiet machine."""

from __future__ import annotations

import pytest

from benchmarks.serve_long_prompt import long_prompt
from benchmarks.serve_processes import Measured, Steps, difference
from benchmarks.serve_report import LoadReport, num_lost, print_load
from ulysses_infer.bench.serve.answer import StreamedAnswer
from ulysses_infer.bench.serve.load import LoadRun
from ulysses_infer.bench.serve.result import result_of


def test_gaps_and_steps_count_while_the_long_prompt_is_prefilled() -> None:
    # tokens at 1.0, 1.1, 1.2 before it came, at 2.0 and 2.5 meanwhile, at 9.0 after it
    stream = StreamedAnswer(first_token=1.0, gaps=[0.1, 0.1, 0.8, 0.5, 6.5])
    steps = {1: (1.0, 0.1), 2: (1.3, 0.7), 3: (2.0, 0.4), 4: (8.0, 1.0)}

    found = long_prompt(512, 1.5, 3.0, [stream], steps)

    assert (found.num_steps, found.num_tokens) == (2, 2)
    assert (found.worst_gap, found.median_gap) == pytest.approx((800, 650))
    assert (found.worst_step, found.median_step) == pytest.approx((700, 550))
    assert found.median_gap_before == pytest.approx(100)
    assert found.prefill_seconds == 1.5


def test_stream_with_too_few_tokens_is_lost() -> None:
    answers = [
        StreamedAnswer(output_tokens=4),
        StreamedAnswer(output_tokens=3),
        StreamedAnswer(output_tokens=4, error="cut"),
    ]

    assert num_lost(LoadRun(answers=answers), output_len=4) == 2


def test_ratios_are_of_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    def measured(seconds: float, cpu: dict[str, float]) -> Measured:
        return Measured(1000, seconds, cpu, Steps(100, 2000, seconds * 0.9))

    http = [measured(2.0, {"rank 0": 1.0, "client": 0.1}), measured(4.0, {"rank 0": 1.0, "client": 0.1})]
    offline = [measured(1.0, {"rank 0": 0.5}), measured(3.0, {"rank 0": 0.5})]
    report = LoadReport(64, result_of(LoadRun(ended=1.0), {}, [99]), 0, http, offline)

    print_load(report)

    assert report.ratios == [0.5, 0.75]
    printed = capsys.readouterr().out
    assert "HTTP / offline: median 0.625, from 0.500 to 0.750" in printed
    assert "rank 0                    1000       500\n" in printed


def test_processes_that_started_later_count_from_zero() -> None:
    assert difference({"a": 3.0, "b": 1.0}, {"a": 1.0}) == {"a": 2.0, "b": 1.0}
