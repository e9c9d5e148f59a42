"""Steps of a benchmark by size, and what switching between two modes can save."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ulysses_infer.bench.results import print_switching
from ulysses_infer.bench.step_sizes import StepSize, StepTotal, savings, sizes_as_json, summed, totals
from ulysses_infer.bench.workload import Sample
from ulysses_infer.engine.stats import StepRecord
from ulysses_infer.parallel.layout import Mode


def step(num_tokens: int, seconds: float, num_decodes: int | None = None) -> StepRecord:
    return StepRecord(0, Mode(1, 2), num_tokens, num_tokens if num_decodes is None else num_decodes, seconds)


def sample(seconds: float, steps: list[StepRecord]) -> Sample:
    return Sample(ttft=0.1, tpot=0.1, seconds=seconds, output_tokens=1, total_tokens=2, steps=totals(steps))


def test_steps_of_up_to_twice_as_many_tokens_have_one_size() -> None:
    sizes = {count: StepSize.of(step(count, 1.0)).most_tokens for count in (1, 2, 3, 4, 5, 8, 9, 256, 257)}
    assert sizes == {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8, 9: 16, 256: 256, 257: 512}
    assert str(StepSize.of(step(5, 1.0))) == "5..8 tokens, decodes"
    assert str(StepSize.of(step(5, 1.0, num_decodes=4))) == "5..8 tokens, with prompts"


def test_only_sizes_that_the_other_mode_runs_faster_are_saved() -> None:
    own = totals([step(1, 2.0), step(1, 4.0), step(64, 10.0)])
    other = totals([step(1, 5.0), step(64, 7.0), step(512, 1.0)])
    assert own[StepSize(False, 1)] == StepTotal(2, 6.0)
    assert savings(own, other) == 3.0
    assert savings(other, own) == 2.0


def test_noise_within_a_size_saves_nothing() -> None:
    assert savings(totals([step(8, 1.0), step(8, 3.0)]), totals([step(8, 3.0), step(8, 1.0)])) == 0.0


def test_runs_are_summed_and_written() -> None:
    runs = [totals([step(1, 2.0)]), totals([step(1, 4.0)])]
    assert summed(runs) == {StepSize(False, 1): StepTotal(2, 6.0)}
    written = {"has_prompts": False, "most_tokens": 1, "steps": 2, "seconds": 6.0}
    assert sizes_as_json({"tp": runs}) == {"tp": [written]}


def test_the_limit_of_switching_is_shown_beside_what_was_reached() -> None:
    output = io.StringIO()
    samples = {
        "tp": [sample(10.0, [step(1, 1.0), step(256, 9.0)])] * 2,
        "sp": [sample(12.0, [step(1, 4.0), step(256, 8.0)])] * 2,
        "shift": [sample(9.5, [])],
    }
    print_switching(Console(file=output, width=120), samples)
    printed = output.getvalue()
    assert "best static mode: tp, 10.00 s; with the faster mode for steps of every size: 9.00 s, 0.900x" in printed
    assert "shift: 0.950x of the best static mode" in printed
    rows = [line.split() for line in printed.splitlines() if "decodes" in line]
    assert rows == [
        ["129..256", "tokens,", "decodes", "1", "9000.00", "8000.00", "0.89x"],
        ["1", "tokens,", "decodes", "1", "1000.00", "4000.00", "4.00x"],
    ]


@pytest.mark.parametrize("modes", [["tp", "shift"], ["sp"]])
def test_nothing_is_compared_without_both_static_modes(modes: list[str]) -> None:
    output = io.StringIO()
    print_switching(Console(file=output), {mode: [sample(1.0, [])] for mode in modes})
    assert output.getvalue() == ""
