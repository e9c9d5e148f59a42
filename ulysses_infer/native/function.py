"""Functions of native libraries, called through ctypes and recorded by CPU graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
"""Kinds of work that CPU graphs time separately."""
EXCHANGES = (ALL_REDUCE, ALL_TO_ALL, GATHER)

_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


class Recorder(Protocol):
    """Records native calls."""

    def record(self, function: NativeFunction, arguments: tuple[Any, ...]) -> None:
        """Record a successful call of `function` with `arguments`."""
        ...


class _Recording:
    """The active recorder of this process, if any. An engine runs its steps on one thread."""

    recorder: Recorder | None = None


recording = _Recording()


def is_recording() -> bool:
    """Whether calls are being recorded: memory passed to them by address must then not be reused."""
    return recording.recorder is not None


@contextmanager
def recording_paused() -> Iterator[None]:
    """What runs in the context is no part of the step that is being recorded, if any."""
    recorder, recording.recorder = recording.recorder, None
    try:
        yield
    finally:
        recording.recorder = recorder


class NativeFunction:
    """The function `name` of `library`. `arguments`: p for an address, i for int64, f for float."""

    def __init__(
        self, library: ctypes.CDLL, name: str, arguments: str, kind: str, check: Callable[[int], None] | None = None
    ) -> None:
        """`check`: for a function that returns a status; raises the error for a nonzero status."""
        self.arguments, self.kind, self.check = arguments, kind, check
        self.entry = ctypes.cast(library[f"{name}_call"], ctypes.c_void_p).value
        """Address of its entry point for CPU graphs (native/call.h)."""
        self._function = library[name]
        self._function.argtypes = [_TYPES[kind] for kind in arguments]
        self._function.restype = None if check is None else ctypes.c_int

    def __call__(self, *arguments: Any) -> None:
        """Call the function with numbers, addresses (None for null) or ctypes objects by reference."""
        status = self._function(*arguments)
        if status and self.check is not None:
            self.check(status)
        if recording.recorder is not None:
            recording.recorder.record(self, arguments)


def native_function(library: str, name: str, arguments: str, kind: str) -> NativeFunction | None:
    """The function `name` of `library`.c, or None if it cannot be built here."""
    return NativeFunction(open_library(library), name, arguments, kind) if is_available(library) else None
