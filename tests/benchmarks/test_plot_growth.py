"""benchmarks/plot_growth.py: the points of a sweep, its time limit and its output."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.plot_growth import Row, draw, fits, powers, rows_of, run_sweep, sweep_points, write_csv
from ulysses_infer.engine.calibration_points import Limits, Point
from ulysses_infer.parallel.layout import Mode

SP, TP = Mode(2, 1), Mode(1, 2)
AMPLE = Limits(num_tokens=4096, num_sequences=512, context=8191, cached=32768)


class Machine:
    """A clock and steps that move it: a prefill takes one second per token in either mode."""

    def __init__(self) -> None:
        self.now = 0.0
        self.visited: list[int] = []

    def visit(self, point: Point) -> dict[Mode, float]:
        took = float(point.shape.num_tokens)
        self.now += 2 * took
        self.visited.append(point.shape.num_tokens)
        return {SP: took, TP: took + 1}

    def clock(self) -> float:
        return self.now


def prefills(*counts: int) -> list[tuple[int, Point]]:
    return [(count, Point(0, 0, ((0, count),))) for count in counts]


def test_with_ample_room_every_size_is_run() -> None:
    sweeps = sweep_points(AMPLE, 512)

    assert [x for x, _ in sweeps["tokens"]] == [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert [x for x, _ in sweeps["requests"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert [x for x, _ in sweeps["context"]] == [128, 256, 512, 1024, 2048, 4096, 8192]


@given(
    limits=st.builds(
        Limits,
        num_tokens=st.integers(1, 4096),
        num_sequences=st.integers(1, 512),
        context=st.integers(16, 9000),
        cached=st.integers(16, 32768),
    )
)
def test_sweeps_keep_the_limits_of_calibration(limits: Limits) -> None:
    for points in sweep_points(limits, 512).values():
        assert all(fits(point, limits) for _, point in points)
        assert [x for x, _ in points] == sorted({x for x, _ in points})


def test_a_sweep_repeats_in_rounds() -> None:
    machine = Machine()

    times = run_sweep(machine.visit, prefills(1, 2), seconds=1000, clock=machine.clock)

    assert machine.visited == [1, 2] * 9
    assert times[2, TP] == [3.0] * 9


def test_a_point_that_would_take_longer_than_is_left_is_not_begun() -> None:
    machine = Machine()

    run_sweep(machine.visit, prefills(1, 2, 4, 100), seconds=20, clock=machine.clock)

    # after 14 seconds there is no time for 100, whose duration is unknown, but for a second round of the others
    assert machine.visited == [1, 2, 4, 1, 2]
    assert machine.now == 20


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6, unique=True), st.floats(1, 500))
def test_a_sweep_of_steps_that_grow_at_most_threefold_keeps_its_time(steps: list[int], seconds: float) -> None:
    machine, counts = Machine(), [1]
    for step in sorted(steps):
        counts += [step] if counts[-1] < step <= 3 * counts[-1] else []

    run_sweep(machine.visit, prefills(*counts), seconds, clock=machine.clock)

    assert machine.now <= max(seconds, 2.0)


def test_rows_have_medians_and_ranges_in_milliseconds() -> None:
    rows = rows_of("tokens", {(16, TP): [0.3, 0.1, 0.2], (16, SP): [0.5]})

    assert rows[0] == pytest.approx(Row("tokens", "SP 1 x TP 2", 16, 200, 100, 300))
    assert rows[1].series == "SP 2 x TP 1"


def test_powers_end_with_the_last_that_fits() -> None:
    assert powers(1, 9) == [1, 2, 4, 8]
    assert powers(16, 16) == [16]


def test_csv_and_plot_hold_every_sweep(tmp_path: Path) -> None:
    rows = [
        *rows_of("tokens", {(count, mode): [count / 1e3] for count in (16, 32) for mode in (SP, TP)}),
        Row("memory", "llama-60m rss", 4096, 900, 900, 900),
    ]

    write_csv(rows, tmp_path / "growth.csv")
    draw(rows, "a title", "of nothing", tmp_path / "growth.png")  # three of its panels have no data

    with (tmp_path / "growth.csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [(row["sweep"], float(row["x"]), float(row["value"])) for row in written] == [
        (row.sweep, row.x, row.value) for row in rows
    ]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
