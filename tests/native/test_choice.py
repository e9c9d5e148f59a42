"""The choice of kernels by measurement, with kernels whose speed is known."""

import json
import time

import pytest

from ulysses_infer.native import choice
from ulysses_infer.native.choice import TORCH, Choice, measure, measured_choice


def spin(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def prepare(name, rows):
    """`flat` takes as long for any number of rows, `steep` as long per row, torch always half of `flat`."""
    seconds = {"flat": 2e-3, "steep": 5e-4 * rows, TORCH: 1e-3}[name]
    return lambda: spin(seconds)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    library = tmp_path / "made.so"
    library.write_bytes(b"code")
    monkeypatch.setattr(choice, "library_path", lambda name: tmp_path / f"{name}.so")
    monkeypatch.setattr(choice, "cache_folder", lambda kind: tmp_path / kind)
    return tmp_path


def test_a_choice_holds_from_a_number_of_rows_to_the_next():
    chosen = Choice({17: "panels", 1: "few", 33: "pairs"})
    assert [chosen(rows) for rows in (0, 1, 16, 17, 32, 33, 5000)] == ["few"] * 3 + ["panels"] * 2 + ["pairs"] * 2
    assert Choice(chosen.kernels).kernels == {1: "few", 17: "panels", 33: "pairs"}


def test_the_fastest_kernel_is_chosen_and_torch_only_for_many_rows():
    assert measure(["steep", "flat", TORCH], prepare, [1, 2, 8, 16, 40]).kernels == {1: "steep", 8: "flat", 16: TORCH}
    assert measure(["steep", TORCH], prepare, [2, 14]).kernels == {2: "steep"}


def test_a_hopeless_kernel_is_not_measured_for_more_rows():
    measured = []

    def noted(name, rows):
        measured.append((name, rows))
        return prepare(name, rows)

    measure(["steep", "flat"], noted, [1, 64, 65])
    assert measured == [("steep", 1), ("flat", 1), ("steep", 64), ("flat", 64), ("flat", 65)]


def test_choices_are_kept_until_the_library_changes(folder):
    first = measured_choice("made", "made-float32", ["steep", "flat"], prepare)
    assert measured_choice("made", "made-float32", ["steep", "flat"], None).kernels == first.kernels
    (kept,) = (folder / "native").glob("made-float32-*.json")
    assert json.loads(kept.read_text()) == {str(rows): name for rows, name in first.kernels.items()}
    kept.write_text("{half a fi")
    assert measured_choice("made", "made-float32", ["flat"], prepare).kernels == {1: "flat"}
    (folder / "made.so").write_bytes(b"other code")
    measured_choice("made", "made-float32", ["flat"], prepare)
    assert len(list((folder / "native").glob("made-float32-*.json"))) == 3


def test_choices_under_other_limits_of_torch_are_measured_again(folder, monkeypatch):
    measured_choice("made", "made-float32", ["flat"], prepare)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    measured_choice("made", "made-float32", ["flat"], prepare)
    assert len(list((folder / "native").glob("made-float32-*.json"))) == 2


def test_without_a_cache_folder_kernels_are_measured_each_time(folder):
    (folder / "native").write_text("a file where the folder should be")
    assert measured_choice("made", "made-float32", ["flat"], prepare).kernels == {1: "flat"}
