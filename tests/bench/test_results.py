"""The order of the runs of an offline benchmark, and what is shown and written while they run and when they end."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from ulysses_infer.bench.offline import interleaved
from ulysses_infer.bench.results import WARM_UP, Results
from ulysses_infer.bench.workload import WARM_UP_TOKENS, RunPrompts, Sample, Workload
from ulysses_infer.config import Config, ParallelConfig

WORKLOAD = Workload(input_len=4, output_len=7, num_prompts=2)


def sample(seconds: float) -> Sample:
    return Sample(ttft=0.1, tpot=0.1, seconds=seconds, output_tokens=10, total_tokens=30)


class Shown:
    """Results of two modes, and what they printed and wrote."""

    def __init__(self, folder: Path, modes: Sequence[str] = ("tp", "sp")) -> None:
        self.file, self.output = folder / "measured.json", io.StringIO()
        options = argparse.Namespace(kind="rollouts", modes=list(modes), repeats=3)
        console = Console(file=self.output, width=120)
        config = Config(parallel=ParallelConfig(sp=2))
        self.results = Results(options, config, WORKLOAD, console, self.file)

    @property
    def text(self) -> str:
        return self.output.getvalue()


@pytest.fixture
def shown(tmp_path: Path) -> Shown:
    return Shown(tmp_path)


def test_repeats_are_interleaved_with_the_same_prompts_in_every_mode(shown: Shown) -> None:
    calls: list[tuple[str, int, str]] = []

    def run_of(mode: str) -> RunPrompts:
        def run(prompts: list[list[int]], output_lens: Sequence[int]) -> Sample:
            calls.append((mode, output_lens[0], str(prompts)))
            return sample(1.0)

        return run

    interleaved({mode: run_of(mode) for mode in ("tp", "sp")}, 3, 100, shown.results)

    assert [mode for mode, _, _ in calls] == ["tp", "sp"] * 4
    assert [length for _, length, _ in calls] == [WARM_UP_TOKENS] * 2 + [7] * 6
    prompts = [text for _, _, text in calls]
    assert prompts[0::2] == prompts[1::2]
    assert len(set(prompts)) == 4
    assert {mode: len(own) for mode, own in shown.results.samples.items()} == {"tp": 3, "sp": 3}


@pytest.mark.parametrize(("seconds", "repeats"), [(None, 3), (100.0, 3), (20.0, 2), (1.0, 1)])
def test_no_repeat_begins_that_would_exceed_the_time_but_one_is_always_measured(
    shown: Shown, seconds: float | None, repeats: int
) -> None:
    runs: dict[str, RunPrompts] = {
        "tp": lambda prompts, lengths: sample(1.0),
        "sp": lambda prompts, lengths: sample(3.0),
    }
    interleaved(runs, 3, 100, shown.results, seconds)
    assert {mode: len(own) for mode, own in shown.results.samples.items()} == {"tp": repeats, "sp": repeats}


def test_time_is_counted_from_what_every_rank_has_measured(tmp_path: Path) -> None:
    """A rank that has no part in mode single must end after the same repeat as rank 0."""
    for single in (lambda prompts, lengths: None, lambda prompts, lengths: sample(90.0)):
        shown = Shown(tmp_path, ("single", "sp"))
        runs: dict[str, RunPrompts] = {"single": single, "sp": lambda prompts, lengths: sample(3.0)}
        interleaved(runs, 3, 100, shown.results, 20.0)
        assert len(shown.results.samples["sp"]) == 2


def test_every_run_is_shown_and_written_as_it_ends(shown: Shown) -> None:
    shown.results.add("tp", WARM_UP, sample(9.0))
    assert "warm-up  tp       makespan s 9.00, 9.0 s" in shown.text
    assert not shown.file.exists()
    shown.results.add("tp", 0, sample(2.0))
    assert "1 of 3   tp       makespan s 2.00, 2.0 s" in shown.text
    assert json.loads(shown.file.read_text())["modes"] == {
        "tp": {
            "makespan": [2.0],
            "median_makespan": 2.0,
            "makespan_of_best": 1.0,
            "output_throughput": [5.0],
            "median_output_throughput": 5.0,
            "output_throughput_of_best": 1.0,
        }
    }


def test_stopped_results_are_those_of_the_modes_that_were_measured(shown: Shown) -> None:
    for seconds in (2.0, 4.0):
        shown.results.add("tp", 0, sample(seconds))
    shown.results.show_stopped()
    assert "stopped: these are the results so far" in shown.text
    assert "2 concurrent requests, 4 tokens in, 7 out, medians of 2" in shown.text
    rows = [line.split()[:4] for line in shown.text.splitlines() if line.startswith(" tp ")]
    assert rows == [["tp", "TP", "2", "3.00"]]
    assert " sp " not in shown.text
    before = shown.text
    shown.results.show()
    assert shown.text == before


def test_numbers_of_repeats_are_shown_where_they_differ(shown: Shown) -> None:
    for repeat, modes in enumerate((("tp", "sp"), ("tp",))):
        for mode in modes:
            shown.results.add(mode, repeat, sample(1.0))
    shown.results.show_stopped()
    assert "medians of 1 to 2" in shown.text


def test_stopped_before_the_first_measurement_says_so(shown: Shown) -> None:
    shown.results.add("tp", WARM_UP, sample(9.0))
    shown.results.show_stopped()
    assert "stopped before a measurement had ended; --seconds N makes them shorter" in shown.text
