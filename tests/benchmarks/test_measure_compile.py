"""`benchmarks/measure_compile.py` on a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.thorough
def test_it_prints_a_row_for_each_way(folder):
    command = [
        sys.executable,
        "-m",
        "benchmarks.measure_compile",
        folder,
        "--context",
        "16",
        "--steps",
        "4",
        "--threads",
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["transformers,", "transformers,", "engine,"]
    assert all(float(row[-1]) > 0 for row in rows)
