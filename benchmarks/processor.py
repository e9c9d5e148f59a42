"""The processor that a benchmark runs on, as it is printed beside figures."""

from __future__ import annotations

import os

import torch

from ulysses_infer.engine.profile_key import device_name
from ulysses_infer.native.levels import levels_here
from ulysses_infer.native.library import LEVEL


def processor() -> str:
    """Its name, usable cores, and the level of instructions: the one asked for, or the best of this processor."""
    best = next((level.name for level in levels_here()), "no known level")
    return f"{device_name(torch.device('cpu'))}, {os.environ.get(LEVEL, best)}"
