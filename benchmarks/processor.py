"""The processor that a benchmark runs on, as it is printed beside figures, and its memory."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from ulysses_infer.engine.profile_key import device_name
from ulysses_infer.native.levels import levels_here
from ulysses_infer.native.library import LEVEL

READ_BYTES = 512 << 20


def memory_reader() -> Callable[[], object]:
    """A call that reads `READ_BYTES` of memory once, in one piece, on all threads."""
    return torch.ones(READ_BYTES // 4).sum


def processor() -> str:
    """Its name, usable cores, and the level of instructions: the one asked for, or the best of this processor."""
    best = next((level.name for level in levels_here()), "no known level")
    return f"{device_name(torch.device('cpu'))}, {os.environ.get(LEVEL, best)}"
