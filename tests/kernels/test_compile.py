"""Every kernel compiles for the supported GPUs without spilling registers, within the shared memory of a block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("compile.py")
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block can use."""


def compiled(*architectures: int) -> list[dict[str, Any]]:
    """What every case uses, compiled in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, architectures)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(architectures: tuple[int, ...]) -> None:
    pytest.importorskip("triton")
    found = compiled(*architectures)
    assert {each["sm"] for each in found} == set(architectures)
    spilled = [each for each in found if each["spills"]]
    assert not spilled
    assert not [each for each in found if each["shared"] > SHARED_MEMORY[each["sm"]]]


def test_kernels_compile_for_hopper_without_spills() -> None:
    check((90,))


@pytest.mark.thorough
def test_kernels_compile_for_ampere_and_blackwell_without_spills() -> None:
    check((80, 100))
