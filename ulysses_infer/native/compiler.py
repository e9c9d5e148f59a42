"""Compiles C files to shared libraries.

Only the standard library is imported, because the build of a wheel loads this file too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
"""Where headers of several subjects are; others lie beside the files that include them."""
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-Wall",
    "-Werror",
    # Needed to vectorise sums; infinities and NaN keep their meaning.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
)
BUILD_SECONDS = 600
"""The longest time one file may take: half a minute of work, on a machine that has much else to do."""


class NativeUnavailableError(Exception):
    """Native code cannot be built or loaded here, with the reason in one line. Callers fall back to torch."""


def find_compiler() -> str:
    """The path of a C compiler. Raises `NativeUnavailableError` if there is none."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NativeUnavailableError("no C compiler (cc, gcc, clang or $CC) was found")
    return compiler


def compile_library(compiler: str, source: Path, target: Path, flags: Sequence[str]) -> None:
    """Compile `source` to the shared library `target`, which appears only once it is complete.

    It is linked without OpenMP: torch has loaded its runtime already. Raises `NativeUnavailableError`.
    """
    unfinished = target.with_suffix(f".{os.getpid()}.o")
    library = target.with_suffix(f".{os.getpid()}")
    try:
        for command in (
            [compiler, *FLAGS, *flags, f"-I{FOLDER}", "-c", str(source), "-o", str(unfinished)],
            [compiler, "-shared", str(unfinished), "-lm", "-o", str(library)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
            if done.returncode:
                reason = next(iter(done.stderr.strip().splitlines()), f"exit {done.returncode}")
                raise NativeUnavailableError(f"{compiler} cannot compile {source.name}: {reason}")
        library.replace(target)
    except subprocess.TimeoutExpired:
        raise NativeUnavailableError(f"{compiler} took more than {BUILD_SECONDS} s to compile {source.name}") from None
    finally:
        unfinished.unlink(missing_ok=True)
        library.unlink(missing_ok=True)
