"""The C files built for older processors than this one, as their users get them."""

import ctypes
import functools
import platform

import pytest

from ulysses_infer.native import library

X86 = ("native", "x86-64-v3", "x86-64") if platform.machine() == "x86_64" else ("native",)


@functools.cache
def build_for(name: str, architecture: str) -> ctypes.CDLL:
    """`name`.c built with -march=`architecture`; skips the test where nothing can be built."""
    if not library.is_available(name):
        pytest.skip("no native code can be built here")
    if architecture == "native":
        return library.open_library(name)
    flags = tuple(f"-march={architecture}" if flag.startswith("-march") else flag for flag in library.FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "FLAGS", flags)
        return ctypes.CDLL(str(library._built(library.FOLDER / f"{name}.c")))
