"""The training scripts start by path, as the deepspeed launcher starts them, and as modules."""

from __future__ import annotations

import sys

import pytest

from tests.launcher import run


@pytest.mark.parametrize("name", ["train_demo_model", "train_rollouts"])
@pytest.mark.parametrize("way", ["path", "module"])
def test_script_starts(name: str, way: str) -> None:
    script = [f"tools/{name}.py"] if way == "path" else ["-m", f"tools.{name}"]
    done = run([sys.executable, *script, "--help"])

    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout
