"""The processor that a benchmark runs on, as it is printed beside figures, and its memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from ulysses_infer.engine.profile_key import device_name
from ulysses_infer.native.levels import levels_here
from ulysses_infer.native.library import LEVEL
from ulysses_infer.native.matmul import NativeMatmul

READ_BYTES = 512 << 20
WIDE_ROW = 8192  # bytes


class MemoryReader:
    """Reads `READ_BYTES` of memory once, on all threads, in the way that is faster here.

    In order (a sum), or in several places by turns (a product of one row).
    """

    def __init__(self) -> None:
        values = torch.ones(READ_BYTES // WIDE_ROW, WIDE_ROW // 2, dtype=torch.bfloat16)
        row, native = torch.ones(1, WIDE_ROW // 2, dtype=torch.bfloat16), NativeMatmul()
        ways: list[Callable[[], object]] = [values.view(torch.float32).sum, lambda: native(row, values)]
        self._read = min(ways, key=lambda way: min(seconds_to(way) for _ in range(3)))

    def seconds(self, repeats: int = 1) -> float:
        """The shortest of `repeats` reads."""
        return min(seconds_to(self._read) for _ in range(repeats))


def seconds_to(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def processor() -> str:
    """Its name, usable cores, and the level of instructions: the one asked for, or the best of this processor."""
    best = next((level.name for level in levels_here()), "no known level")
    return f"{device_name(torch.device('cpu'))}, {os.environ.get(LEVEL, best)}"
