"""A benchmark that a signal stops shows and keeps what it has measured by then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.job.test_child_processes import MARK, assert_gone

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 200.0
SIZES = ["--input-len", "6", "--output-len", "4", "--num-prompts", "2", "--samples", "2", "--repeats", "100000"]
SETTINGS = ["parallel.sp=2", "cache.block_size=4", "runtime.device=cpu", "runtime.threads_per_rank=1"]


@pytest.mark.launcher
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)])
def test_results_so_far_are_kept(folder: str, tmp_path: Path, number: signal.Signals) -> None:
    file, mark = tmp_path / "measured.json", f"stopped {tmp_path}"
    command = ["bench", "rollouts", folder, *SIZES, "--modes", "tp,sp", "--json", str(file), *SETTINGS]
    variables = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", MARK: mark}
    process = subprocess.Popen(
        [sys.executable, "-m", "ulysses_infer.cli", *command],
        cwd=ROOT,
        env={**os.environ, **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    timer = threading.Timer(START_SECONDS, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        started = ""
        while "2 of 100000 sp" not in started:
            line = process.stdout.readline()
            assert line, started
            started += line
        process.send_signal(number)
        output = process.stdout.read()
        assert process.wait() == 128 + number
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    assert "stopped: these are the results so far" in output
    assert "best static mode" in output
    assert "error" not in output
    measured = json.loads(file.read_text())["modes"]
    assert min(len(measured[mode]["makespan"]) for mode in ("tp", "sp")) >= 2
    assert_gone(mark)
