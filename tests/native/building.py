"""The C files built for other processors than this one, as their users get them."""

import ctypes
import functools
from typing import Any

import pytest

from tests.native.emulated import ARM, emulated, needs_emulator
from ulysses_infer.native import library
from ulysses_infer.native.compiler import STRICT
from ulysses_infer.native.levels import levels_here

X86 = ("native", *(level.name for level in levels_here() if level.name in ("x86-64-v3", "x86-64-v2")))
"""What is compiled for this processor, and for older ones."""

X86_OF_LARGE = [pytest.param(level, marks=[pytest.mark.thorough] * (level == "x86-64-v2")) for level in X86]
"""The same for files that take long to compile."""

ARM_LEVELS = [pytest.param(level, marks=[pytest.mark.thorough, needs_emulator]) for level in ARM]
"""What is compiled for Arm, and run by an emulator."""


@functools.cache
def build_for(name: str, level: str) -> Any:
    """`name`.c built for `level`; skips the test where nothing can be built."""
    if level in ARM:
        return emulated(name, level)
    if not library.is_available(name):
        pytest.skip("no native code can be built here")
    flags = next(((*known.flags, *STRICT) for known in levels_here() if known.name == level), ("-march=native",))
    return ctypes.CDLL(str(library.built(library.source_of(name), flags)))
