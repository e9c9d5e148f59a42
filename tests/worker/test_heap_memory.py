"""Freed memory stays with the process, to be used again without touching new pages."""

from __future__ import annotations

import subprocess
import sys

import pytest

TENSORS, MEBIBYTES, PAGE = 3, 40, 4096
PROGRAM = f"""
import resource, sys, torch
from ulysses_infer.worker.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("unknown"); sys.exit()
def step():
    return [torch.ones({MEBIBYTES} << 20, dtype=torch.uint8) for _ in range({TENSORS})]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that five steps touch for the first time, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "unknown":
        pytest.skip("this C library has no mallopt")
    return int(done.stdout)


def test_steps_touch_few_new_pages_once_memory_is_kept():
    left = faults("leave")
    assert left >= 5 * TENSORS * (MEBIBYTES << 20) // PAGE
    assert faults("keep") < left / 4  # the heap may grow once more


def test_frozen_objects_are_not_collected_again():
    program = """
import gc
from ulysses_infer.worker.memory import freeze_gc
kept = [[number] for number in range(1000)]
freeze_gc()
assert gc.get_freeze_count() > 1000
assert not any(kept[0] is each for each in gc.get_objects())
"""
    subprocess.run([sys.executable, "-c", program], check=True)
