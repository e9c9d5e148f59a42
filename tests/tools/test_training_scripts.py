"""The training scripts start by path, as the deepspeed launcher starts them, and as modules."""

from __future__ import annotations

import sys

import pytest

from tests.launcher import run


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("train_demo_model", "path"),
        ("train_demo_model", "module"),
        ("train_rollouts", "path"),  # as in `test_train_rollouts.py`
        ("train_rollouts", "module"),
    ],
)
def test_script_starts(name: str, way: str) -> None:
    script = [f"tools/{name}.py"] if way == "path" else ["-m", f"tools.{name}"]
    done = run([sys.executable, *script, "--help"])

    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout
