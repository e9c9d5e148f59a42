"""Compiles and loads the C files of this folder, each as a shared library that is cached on disk."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from ulysses_infer.cache_folders import cache_folder

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
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
BUILD_SECONDS = 120
SWITCH = "ULYSSES_INFER_NATIVE"
"""Environment variable; 0 disables native code, so that torch computes everything."""


class NativeUnavailableError(Exception):
    """Native code cannot be built or loaded here, with the reason in one line. Callers fall back to torch."""


@functools.cache
def open_library(name: str) -> ctypes.CDLL:
    """Load the library of `name`.c, compiled if it is not cached. Calls into it release the GIL.

    It shares torch's OpenMP threads (`torch.set_num_threads`).
    Raises `NativeUnavailableError` if it cannot be built or opened here.
    """
    if os.environ.get(SWITCH) == "0":
        raise NativeUnavailableError(f"{SWITCH}=0")
    path = _built(FOLDER / f"{name}.c")
    _share_openmp()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path} cannot be opened: {error}") from error


def is_available(name: str) -> bool:
    """Whether `open_library(name)` works; logs the reason if not."""
    try:
        open_library(name)
    except NativeUnavailableError as error:
        logger.info("no native %s (%s); torch is used instead", name, error)
        return False
    return True


def _built(source: Path) -> Path:
    """The shared library of `source`, from the cache or compiled now, by one process while others wait."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NativeUnavailableError("no C compiler (cc, gcc, clang or $CC) was found")
    text = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    identity = b"\0".join([text, *(part.encode() for part in (compiler, *FLAGS, _processor()))])
    target = cache_folder("native") / f"{source.stem}-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:  # released when its process ends, so it cannot go stale
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file():
                _compile(compiler, source, target)
    except OSError as error:
        raise NativeUnavailableError(f"{target.parent} cannot be written: {error.strerror}") from error
    return target


def _compile(compiler: str, source: Path, target: Path) -> None:
    unfinished = target.with_suffix(f".{os.getpid()}.o")
    library = target.with_suffix(f".{os.getpid()}")
    try:
        # Linked without OpenMP: torch has loaded its runtime already.
        for command in (
            [compiler, *FLAGS, "-c", str(source), "-o", str(unfinished)],
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


def _processor() -> str:
    """What -march=native depends on: different machines may share the cache folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


@functools.cache
def _share_openmp() -> None:
    """Make torch's OpenMP runtime visible to the libraries; a second runtime would create its own threads."""
    torch.get_num_threads()
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8").splitlines() if maps.is_file() else []
    found = {line.split()[-1] for line in lines if "libgomp" in line or "libiomp" in line or "libomp" in line}
    if not found:
        raise NativeUnavailableError("torch has loaded no OpenMP runtime")
    for path in sorted(found):
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
