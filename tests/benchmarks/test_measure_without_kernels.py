"""The comparison of starts with and without kernels: what is run, and what is printed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure_without_kernels


def test_each_case_runs_with_and_without_kernels_on_the_same_instructions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[str, str]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        started.append((env["ULYSSES_INFER_NATIVE"], env["ATEN_CPU_CAPABILITY"]))
        seconds = {"1": 0.001, "0": 0.004}[env["ULYSSES_INFER_NATIVE"]]
        return subprocess.CompletedProcess(command, 0, "a line\n" + json.dumps({"decode": seconds, "16": 2 * seconds}))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(measure_without_kernels, "random_model", lambda name: tmp_path / name)
    output = tmp_path / "found.json"
    measure_without_kernels.main(["--level", "x86-64-v3", "--output", str(output)])
    assert started == 2 * [("1", "avx2"), ("0", "avx2")]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1::4] == ["demo, x86-64-v3", "llama-60m, x86-64-v3"]
    assert lines[3].split() == ["decode,", "1", "row", "1.00", "4.00", "4.00"]
    assert lines[4].split() == ["prompt,", "16", "2.00", "8.00", "4.00"]
    assert json.loads(output.read_text())["x86-64-v3"]["demo"]["decode"] == [0.001, 0.004]
