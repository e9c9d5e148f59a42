"""Loads the C files of this folder and those inside it as shared libraries: shipped by the wheel, or compiled here."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ulysses_infer.cache_folders import cache_folder
from ulysses_infer.native.compiler import (
    CLANG_OPENMP,
    FLAGS,
    NativeUnavailableError,
    compile_library,
    find_compiler,
    sources,
)
from ulysses_infer.native.levels import Level, describe_processor, levels_here

__all__ = ["NativeUnavailableError", "is_available", "is_switched_off", "library_path", "open_library"]

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
SHIPPED = FOLDER / "built"
"""Libraries of a wheel: one folder per level."""
SWITCH = "ULYSSES_INFER_NATIVE"
"""Environment variable; 0 disables native code, so that torch computes everything."""
LEVEL = "ULYSSES_INFER_NATIVE_LEVEL"
"""Environment variable; the name of the level to use, or `native` to compile for exactly this processor."""
NATIVE = "native"


@functools.cache
def open_library(name: str) -> ctypes.CDLL:
    """Load the library of `name`.c, compiled if it is neither shipped nor cached. Calls into it release the GIL.

    It shares torch's OpenMP threads (`torch.set_num_threads`).
    Raises `NativeUnavailableError` if it cannot be built or opened here.
    """
    path = library_path(name)
    _share_openmp()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path} cannot be opened: {error}") from error


def library_path(name: str) -> Path:
    """The shared library of `name`.c for this processor, compiled if need be. Raises `NativeUnavailableError`."""
    if is_switched_off():
        raise NativeUnavailableError(f"{SWITCH}=0")
    wanted = os.environ.get(LEVEL)
    for level in _levels(wanted):
        shipped = SHIPPED / level.name / f"{name}.so"
        if shipped.is_file():
            return shipped
        if wanted:
            return built(source_of(name), level.flags)
    return built(source_of(name), ("-march=native",))


def source_of(name: str) -> Path:
    """The file `name`.c. Raises `NativeUnavailableError` if there is none."""
    found = next((path for path in sources() if path.stem == name), None)
    if found is None:
        raise NativeUnavailableError(f"there is no {name}.c")
    return found


def is_switched_off() -> bool:
    """Whether the user disabled native code."""
    return os.environ.get(SWITCH) == "0"


def is_available(name: str) -> bool:
    """Whether `open_library(name)` works; logs the reason if not."""
    try:
        open_library(name)
    except NativeUnavailableError as error:
        logger.info("no native %s (%s); torch is used instead", name, error)
        return False
    return True


def _levels(wanted: str | None) -> list[Level]:
    """The levels to look for, best first: those of the processor, or only the wanted one, or none for `native`."""
    here = levels_here()
    if wanted is None:
        return here
    found = [level for level in here if level.name == wanted]
    if not found and wanted != NATIVE:
        names = ", ".join([NATIVE, *(level.name for level in here)])
        raise NativeUnavailableError(f"{LEVEL}={wanted} is not a level of this processor (they are {names})")
    return found


def built(source: Path, flags: Sequence[str]) -> Path:
    """The shared library of `source`, from the cache or compiled now, by one process while others wait.

    flags: those of the level. Raises `NativeUnavailableError`.
    """
    compiler = find_compiler()
    text = b"".join(path.read_bytes() for path in (source, CLANG_OPENMP, *sorted(FOLDER.rglob("*.h"))))
    identity = b"\0".join([text, *(part.encode() for part in (*compiler, *FLAGS, *flags, describe_processor()))])
    target = cache_folder("native") / f"{source.stem}-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:  # released when its process ends, so it cannot go stale
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file():
                compile_library(compiler, source, target, flags)
    except OSError as error:
        raise NativeUnavailableError(f"{target.parent} cannot be written: {error.strerror}") from error
    return target


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
