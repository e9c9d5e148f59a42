"""Functions of native libraries, called through ctypes and recorded by CPU graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

from ulysses_infer.native.library import is_available, open_library

MATMUL, ATTENTION, ELEMENTWISE, ALL_REDUCE, ALL_TO_ALL, GATHER = KINDS = (
    "matmul",
    "attention",
    "elementwise",
    "all_reduce",
    "all_to_all",
    "gather",
)
"""Kinds of work, by which a graph keeps the time."""
EXCHANGES = (ALL_REDUCE, ALL_TO_ALL, GATHER)

_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


class Recorder(Protocol):
    """What takes note of the calls of a thread."""

    def note(self, function: NativeFunction, arguments: tuple[Any, ...]) -> None:
        """`function` has been called with `arguments`, and succeeded."""
        ...


class _Recording:
    """The recorder of this process, if one is at work: an engine runs its steps on one thread."""

    recorder: Recorder | None = None


recording = _Recording()


def is_recording() -> bool:
    """Whether calls are being noted: what they are given by address must then be theirs alone."""
    return recording.recorder is not None


class NativeFunction:
    """`name` of `library`. `arguments`: p for an address, i for an int64, f for a float."""

    def __init__(
        self, library: ctypes.CDLL, name: str, arguments: str, kind: str, check: Callable[[int], None] | None = None
    ) -> None:
        """`check`, for a function that returns a status, raises what a status other than 0 means."""
        self.arguments, self.kind, self.check = arguments, kind, check
        self.entry = ctypes.cast(library[f"{name}_call"], ctypes.c_void_p).value
        """Address of its form for graphs (native/call.h)."""
        self._function = library[name]
        self._function.argtypes = [_TYPES[kind] for kind in arguments]
        self._function.restype = None if check is None else ctypes.c_int

    def __call__(self, *arguments: Any) -> None:
        """Call it; numbers, addresses (None for null), and ctypes objects by reference."""
        status = self._function(*arguments)
        if status and self.check is not None:
            self.check(status)
        if recording.recorder is not None:
            recording.recorder.note(self, arguments)


def native_function(library: str, name: str, arguments: str, kind: str) -> NativeFunction | None:
    """`name` of the file `library`.c, where that can be built; None: whoever asks has another way."""
    return NativeFunction(open_library(library), name, arguments, kind) if is_available(library) else None
