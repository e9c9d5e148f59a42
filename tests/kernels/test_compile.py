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


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """What each case uses that Python with these arguments compiles, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(architectures: tuple[int, ...]) -> None:
    pytest.importorskip("triton")
    found = compiled(str(SCRIPT), *map(str, architectures))
    assert {each["sm"] for each in found} == set(architectures)
    assert not too_large(found)


def too_large(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernels that spill registers or need more shared memory than a block can use."""
    return [each for each in found if each["spills"] or each["shared"] > SHARED_MEMORY[each["sm"]]]


def test_kernels_compile_for_hopper_without_spills() -> None:
    check((90,))


@pytest.mark.thorough
def test_kernels_compile_for_ampere_and_blackwell_without_spills() -> None:
    check((80, 100))


TOO_WIDE = """
import json
from tests.kernels.compile import _attention, compile_case
for case in _attention("too wide", 4, 512, 1024):
    print(json.dumps(compile_case(case, 80)))
"""


def test_a_kernel_too_large_for_shared_memory_is_noticed() -> None:
    """Attention refuses heads of this width for that reason."""
    pytest.importorskip("triton")
    (found,) = compiled("-c", TOO_WIDE)
    assert found["shared"] > SHARED_MEMORY[80]
    assert too_large([found]) == [found]
    assert too_large([{**found, "shared": 99 * 1024, "spills": 0}]) == []
