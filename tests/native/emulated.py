"""Libraries compiled for Arm, whose functions run in an emulator on copies of the memory that they are given.

Every address among a call's arguments, and in the structures that they point to, is found by comparing words with this
process's mappings. What lies there goes to the emulated program, at addresses of its own, and what it changes comes
back. So tests call these libraries as they call those of this processor.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from ulysses_infer.native.compiler import FLAGS, STRICT
from ulysses_infer.native.levels import LEVELS
from ulysses_infer.native.library import FOLDER, source_of

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
ARM = {level.name: level.flags for level in LEVELS if level.machine == "aarch64"}
PROGRAM = Path(__file__).parent / "arm" / "call.c"
REACH = 1 << 21
"""Bytes after an address that are copied, at most: tests' tensors are smaller."""
STRUCTURE = 512
"""Bytes of a structure that are searched for addresses, at most."""
PAGE, FIRST = 4096, 0x2000000000  # where the copies begin in the emulated program
needs_emulator = pytest.mark.skipif(
    not shutil.which(COMPILER) or not shutil.which(EMULATOR),
    reason=f"needs {COMPILER} and {EMULATOR} (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)",
)


class Region(NamedTuple):
    """Memory of this process, and where its copy is."""

    start: int
    stop: int
    copy: int

    def holds(self, address: int) -> bool:
        """Whether `address` is one of this process in the region."""
        return self.start <= address < self.stop


class EmulatedLibrary:
    """A C file compiled for a level of Arm; stands in for `ctypes.CDLL`."""

    def __init__(self, name: str, level: str) -> None:
        self._flags, self._folder = (*FLAGS, *STRICT, *ARM[level]), Path(tempfile.mkdtemp())
        self._object = self._folder / f"{name}.o"
        _compile(*self._flags, f"-I{FOLDER}", "-c", str(source_of(name)), "-o", str(self._object))

    def __getitem__(self, name: str) -> Any:
        """A function; entry points of CPU graphs are null, because no graph can call them here."""
        return ctypes.c_void_p() if name.endswith("_call") else self.function(name)

    def __getattr__(self, name: str) -> EmulatedFunction:
        symbols = subprocess.run([f"{COMPILER[:-3]}nm", str(self._object)], capture_output=True, text=True, check=True)
        if f" T {name}\n" not in symbols.stdout:
            raise AttributeError(name)
        return self.function(name)

    @functools.cache  # noqa: B019 (libraries live as long as the tests)
    def function(self, name: str) -> EmulatedFunction:
        """The function `name`."""
        return EmulatedFunction(self, name)

    def program(self, name: str, is_plain: bool) -> Path:
        """The emulated program that calls the function."""
        program = self._folder / name
        if not program.exists():
            kind = (f"-DFUNCTION={name}", "-DIS_PLAIN") if is_plain else (f"-DFUNCTION={name}_call",)
            files = (str(PROGRAM), str(self._object), "-o", str(program), "-lm")
            _compile(*self._flags, *kind, "-static", *files)
        return program


class EmulatedFunction:
    """A function of an `EmulatedLibrary`; stands in for a function of `ctypes`."""

    def __init__(self, library: EmulatedLibrary, name: str) -> None:
        self._library, self._name = library, name
        self.argtypes: list[Any] = []
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> int:
        """Run the function, and change this process's memory as it does."""
        is_plain = self._name.startswith("floats_of_")
        words = [_word(value, kind) for value, kind in zip(arguments, self.argtypes or [None], strict=False)]
        regions = _reached(words)
        read = [_read(region) for region in regions]
        copies = [each.copy() for each in read]
        _move_addresses(words, regions, copies)
        moved = [_moved(word, regions) for word in words]
        header = struct.pack("q", len(regions))
        header += b"".join(struct.pack("qq", region.copy, region.stop - region.start) for region in regions)
        header += struct.pack(f"q{len(moved)}q", len(moved), *moved)
        command = [EMULATOR, "-cpu", "max", str(self._library.program(self._name, is_plain))]
        given = header + b"".join(copy.tobytes() for copy in copies)
        done = subprocess.run(command, input=given, capture_output=True, check=True, env={"OMP_NUM_THREADS": "2"})
        place = 8
        for region, before, copy in zip(regions, read, copies, strict=True):
            _write_changes(region, before, copy, np.frombuffer(done.stdout, np.uint8, len(copy), place))
            place += len(copy)
        result: int = struct.unpack_from("q", done.stdout)[0]
        return result


@functools.cache
def emulated(name: str, level: str) -> EmulatedLibrary:
    """`name`.c compiled for a level of Arm."""
    return EmulatedLibrary(name, level)


def _compile(*arguments: str) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _word(value: Any, kind: Any) -> int:
    """An argument as the 64-bit integer that entry points of CPU graphs take."""
    if kind is ctypes.c_float:
        return int.from_bytes(struct.pack("f", value), "little")
    if value is None or isinstance(value, int):
        return value or 0
    return ctypes.addressof(getattr(value, "_obj", value))


def _mappings() -> list[tuple[int, int]]:
    """Memory of this process that can be read and written, by address; neighbours are joined."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    spans = sorted(tuple(int(part, 16) for part in line[0].split("-")) for line in lines if line[1].startswith("rw"))
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and start == joined[-1][1]:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def _reached(words: list[int]) -> list[Region]:
    """What the addresses among `words`, and in what they point to, reach."""
    mappings = _mappings()
    starts = [start for start, _ in mappings]
    spans: dict[int, int] = {}
    waiting, seen = [(word, 0) for word in words], set()
    while waiting:
        word, depth = waiting.pop()
        index = bisect.bisect_right(starts, word) - 1
        if index < 0 or word >= mappings[index][1]:
            continue
        start, stop = word - word % PAGE, min(word + REACH, mappings[index][1])
        spans[start] = max(stop, spans.get(start, 0))
        if depth < 2 and word not in seen and word % 8 == 0:
            seen.add(word)
            inside = np.frombuffer(_bytes_at(word, min(STRUCTURE, stop - word) // 8 * 8), np.int64)
            waiting += [(each, depth + 1) for each in inside.tolist() if each > 0]
    return _placed(spans)


def _placed(spans: dict[int, int]) -> list[Region]:
    """Spans that overlap are joined."""
    joined: list[list[int]] = []
    for start, stop in sorted(spans.items()):
        stop += -stop % PAGE
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], stop)
        else:
            joined.append([start, stop])
    regions, copy = [], FIRST
    for start, stop in joined:
        regions.append(Region(start, stop, copy))
        copy += stop - start + PAGE
    return regions


def _read(region: Region) -> np.ndarray:
    """What the region holds; zeros where the allocator has returned pages meanwhile."""
    held = np.zeros(region.stop - region.start, np.uint8)
    found = np.frombuffer(_bytes_at(region.start, len(held)), np.uint8)
    held[: len(found)] = found
    return held


def _bytes_at(address: int, size: int) -> bytes:
    """Up to `size` bytes of this process's memory."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        try:
            return os.pread(memory.fileno(), size, address)
        except OSError:  # nothing there any more
            return b""


def _moved(word: int, regions: list[Region]) -> int:
    """Where the copy of what `word` points to is; `word` itself if it is no address."""
    found = next((region for region in regions if region.holds(word)), None)
    return word if found is None else word - found.start + found.copy


def _move_addresses(words: list[int], regions: list[Region], copies: list[np.ndarray]) -> None:
    """Let the structures that `words` point to, in the copies, point to the copies."""
    waiting, seen = [(word, 0) for word in words], set()
    while waiting:
        word, depth = waiting.pop()
        index = next((i for i, region in enumerate(regions) if region.holds(word)), None)
        if index is None or word % 8 or word in seen or depth > 1:
            continue
        seen.add(word)
        first = word - regions[index].start
        view = copies[index][first : first + STRUCTURE // 8 * 8].view(np.int64)
        for place, each in enumerate(view.tolist()):
            if each > 0 and any(region.holds(each) for region in regions):
                view[place] = _moved(each, regions)
                waiting.append((each, depth + 1))


def _write_changes(region: Region, read: np.ndarray, given: np.ndarray, after: np.ndarray) -> None:
    """read: what this process had; given: the same with moved addresses, as the program got it."""
    changed = given != after
    words = changed.view(np.int64) != 0
    moved = read.view(np.int64) != given.view(np.int64)
    changed |= np.repeat(words & moved, 8)
    places = np.flatnonzero(changed)
    target = np.ctypeslib.as_array((ctypes.c_uint8 * len(given)).from_address(region.start))
    target[places] = after[places]
