"""The arithmetic of benchmarks/ideal_scaling.py; its measurements need a quiet machine."""

from __future__ import annotations

import pytest

from benchmarks.ideal_scaling import Spent, cases, found_of, merge, rank_environment
from ulysses_infer.parallel.layout import Mode

ALONE = {"step": [[Spent(1.9, 0.0)], [Spent(2.0, 0.0)], [Spent(2.5, 0.0)]]}
CROWD = {"step": [[Spent(2.2, 0.0), Spent(2.4, 0.0)]]}


def test_waiting_for_a_slower_rank_counts_as_work_for_the_slowest_alone() -> None:
    # rank 1 computes 1.2 s; rank 0 computes 1.0 s and waits 0.2 s within an exchange that takes 0.1 s
    ranks = {"step": [[Spent(1.3, 0.3), Spent(1.3, 0.1)]] * 3}

    found = found_of("step", ALONE, CROWD, ranks)

    assert (found.alone, found.crowd) == pytest.approx((2.0, 2.3))
    shares = found.shares(2)
    assert shares["whole"] == pytest.approx(1 / 1.3)
    assert shares["slowest"] == pytest.approx(1 / 1.2)
    assert shares["rank 0"] == pytest.approx(1.0)


def test_ranks_that_split_evenly_and_exchange_nothing_are_ideal() -> None:
    ranks = {"step": [[Spent(1.0, 0.0), Spent(1.0, 0.0)]]}

    assert set(found_of("step", ALONE, CROWD, ranks).shares(2).values()) == {1.0}


def test_prefills_run_in_sp_and_decodes_in_tp() -> None:
    prefill, decode = cases([512], [8])

    assert (prefill.mode(4), decode.mode(4)) == (Mode(4, 1), Mode(1, 4))
    assert prefill.mode(1) == decode.mode(1) == Mode(1, 1)
    assert (prefill.point.shape.num_tokens, decode.point.shape.num_tokens) == (512, 8)


def test_rounds_are_merged_by_case() -> None:
    assert merge([ALONE, ALONE])["step"] == ALONE["step"] * 2


def test_one_rank_gets_no_variables_of_a_launcher() -> None:
    assert rank_environment(0, 1, 1234).get("WORLD_SIZE") is None
    assert rank_environment(1, 2, 1234)["RANK"] == "1"
