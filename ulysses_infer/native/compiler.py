"""Compiles C files to shared libraries.

Only the standard library is imported, because the build of a wheel loads this file too.
"""

from __future__ import annotations

import functools
import os
import shlex
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
    # Where loops begin would otherwise change with any edit, and with it their speed by up to 8 %.
    "-falign-functions=64",
    "-falign-loops=32",
    # Needed to vectorise sums; infinities and NaN keep their meaning.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
)
STRICT = ("-Wall", "-Werror")
"""Also in tests. Not for users, whose compiler may know warnings that ours do not."""
COMPILERS = ("gcc", "clang", "cc")
CLANG_OPENMP = FOLDER / "openmp" / "clang_openmp.c"
"""Linked to what clang compiles."""
BUILD_SECONDS = 600
"""The longest time one file may take: half a minute of work, on a machine that has much else to do."""


class NativeUnavailableError(Exception):
    """Native code cannot be built or loaded here, with the reason in one line. Callers fall back to torch."""


def find_compiler() -> tuple[str, ...]:
    """The command of a C compiler: $CC, which may have arguments, else gcc, else clang.

    Raises `NativeUnavailableError` if there is none.
    """
    wanted = shlex.split(os.environ.get("CC", ""))
    names = wanted[:1] or COMPILERS
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None and wanted:
        raise NativeUnavailableError(f"CC={wanted[0]} is not a program here; name another C compiler or unset CC")
    if path is None:
        raise NativeUnavailableError(f"no C compiler ({', '.join(COMPILERS)} or $CC) was found")
    return (path, *wanted[1:])


def sources() -> list[Path]:
    """The C files of which each is a library."""
    return [path for path in sorted(FOLDER.rglob("*.c")) if path != CLANG_OPENMP]


def compile_library(compiler: tuple[str, ...], source: Path, target: Path, flags: Sequence[str]) -> None:
    """Compile `source` to the shared library `target`, which appears only once it is complete.

    It is linked without OpenMP: torch has loaded its runtime already. Raises `NativeUnavailableError`.
    """
    library = target.with_suffix(f".{os.getpid()}")
    objects: list[Path] = []
    try:
        for each in (source, CLANG_OPENMP) if _is_clang(compiler) else (source,):
            objects.append(target.with_suffix(f".{os.getpid()}.{each.stem}.o"))
            _run(compiler, source, *FLAGS, *flags, f"-I{FOLDER}", "-c", str(each), "-o", str(objects[-1]))
        _run(compiler, source, "-shared", *map(str, objects), "-lm", "-o", str(library))
        library.replace(target)
    finally:
        for path in (*objects, library):
            path.unlink(missing_ok=True)


@functools.cache
def _is_clang(compiler: tuple[str, ...]) -> bool:
    """Whether the compiler is clang, whatever its name. Raises `NativeUnavailableError` if it does not run."""
    return "__clang__" in _run(compiler, Path(os.devnull), "-dM", "-E", "-x", "c", os.devnull)


def _run(compiler: Sequence[str], source: Path, *arguments: str) -> str:
    """What the compiler prints. Raises `NativeUnavailableError` if it fails, for `source`."""
    name, command = " ".join(compiler), [*compiler, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NativeUnavailableError(f"{name} took more than {BUILD_SECONDS} s to compile {source.name}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = next((line for line in lines if "error" in line), next(iter(lines), f"exit {done.returncode}"))
        raise NativeUnavailableError(f"{name} cannot compile {source.name}: {reason}")
    return done.stdout
