"""Workloads that fit a time, predicted from a probe."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.bench.fitting import Pace, fitted, probe
from ulysses_infer.bench.workload import Sample, Workload
from ulysses_infer.cli.arguments import ROLLOUTS_SECONDS, parse

ROLLOUTS = Workload(input_len=256, output_len=64, num_prompts=32, samples=8, tail=1.0)
SLOW = Pace(prompt_token=0.002, lone_step=0.04, step=0.1, rows=16)
FAST = Pace(prompt_token=0.00001, lone_step=0.004, step=0.005, rows=16)


def test_a_run_takes_its_prompts_and_a_step_for_every_token_of_those_that_still_run() -> None:
    pace = Pace(prompt_token=10.0, lone_step=1.0, step=3.0, rows=3)
    assert [pace.step_of(rows) for rows in (1, 2, 3, 5)] == [1.0, 2.0, 3.0, 5.0]
    # three outputs until two end, which have their first tokens from their prompts; then one alone
    assert pace.seconds(2, [2, 2, 5]) == 3 * 2 * 10 + 1 * 3.0 + 3 * 1.0
    assert pace.seconds(1, [1]) == 10.0


def test_a_step_of_many_rows_is_not_predicted_to_take_less_than_one_of_a_single_row() -> None:
    assert Pace(prompt_token=0.0, lone_step=2.0, step=1.0, rows=8).step_of(64) == 2.0


@pytest.mark.parametrize("paces", [[SLOW], [FAST, SLOW]])
def test_what_takes_too_long_becomes_smaller_and_keeps_its_tail(paces: list[Pace]) -> None:
    found = fitted(ROLLOUTS, paces, num_modes=3, repeats=3, seconds=240.0)
    assert SLOW.all_runs(found, 3, 3) <= 240.0 < SLOW.all_runs(ROLLOUTS, 3, 3)
    lengths = found.output_lens(0)
    assert len(lengths) >= 16
    assert max(lengths) >= 4 * statistics.median(lengths)


def test_what_fits_stays_as_it_is() -> None:
    assert fitted(ROLLOUTS, [FAST], num_modes=4, repeats=3, seconds=240.0) == ROLLOUTS
    assert fitted(ROLLOUTS, [], num_modes=4, repeats=3, seconds=1.0).num_prompts == 32  # a rank without a probe


def test_the_smallest_workload_is_taken_if_none_fits() -> None:
    found = fitted(ROLLOUTS, [SLOW], num_modes=4, repeats=3, seconds=0.001)
    assert (found.num_prompts, found.samples, found.input_len, found.output_len) == (4, 4, 64, 8)
    assert found.smaller() is None
    lone = Workload(input_len=8, output_len=4, num_prompts=1)
    assert fitted(lone, [SLOW], num_modes=4, repeats=3, seconds=0.001) == lone


@given(
    st.builds(
        Workload,
        input_len=st.integers(1, 999),
        output_len=st.integers(1, 300),
        num_prompts=st.integers(1, 99),
        samples=st.integers(1, 20),
        tail=st.sampled_from([0.0, 1.0, 3.0]),
    )
)
def test_each_smaller_workload_takes_less(workload: Workload) -> None:
    smaller = workload.smaller()
    if smaller is not None:
        assert SLOW.all_runs(smaller, 2, 3) <= SLOW.all_runs(workload, 2, 3)
        assert sum(smaller.output_lens(0)) + smaller.input_len < sum(workload.output_lens(0)) + workload.input_len


def test_a_probe_measures_requests_together_and_alone_after_a_warm_up() -> None:
    runs: list[int] = []

    def run(prompts: list[list[int]], output_lens: Sequence[int]) -> Sample:
        runs.append(len(prompts))
        together = len(prompts) > 1
        slow = 100.0 * (len(runs) == 1)
        tpot = (0.5 if together else 0.2) + slow
        return Sample(1.0, tpot, seconds=6.0 + (len(set(output_lens)) and 7 * tpot), output_tokens=8, total_tokens=9)

    pace = probe(run, ROLLOUTS, 100, "tp")
    assert runs == [8, 8, 1]
    assert pace == Pace(prompt_token=pytest.approx(6.0 / 8 / 64), lone_step=0.2, step=0.5, rows=8)
    assert probe(lambda prompts, lengths: None, ROLLOUTS, 100, "single") is None


def test_only_the_default_workload_of_rollouts_is_fitted_unasked() -> None:
    def seconds(*arguments: str) -> float | None:
        found: float | None = parse(["bench", *arguments, "models/demo"]).options.seconds
        return found

    assert seconds("rollouts") == ROLLOUTS_SECONDS
    assert seconds("rollouts", "--seconds", "9") == 9.0
    assert seconds("rollouts", "--samples", "2") is None
    assert seconds("rollouts", "--samples", "2", "--seconds", "9") == 9.0
    assert seconds("throughput") is None
    assert seconds("latency") is None
    options = parse(["bench", "rollouts", "--samples", "2", "models/demo"]).options
    assert (options.num_prompts, options.samples, options.input_len, options.output_len) == (32, 2, 256, 64)
