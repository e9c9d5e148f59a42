"""Ctrl-C, or a notebook's interrupt, while an engine works: the work ends between two steps, and the engine lives."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TWICE_SECONDS = 1.0
"""A second interrupt within this time of the first ends the engine."""


class Interrupts:
    """Postpones SIGINT to the next `check`. A second one, while the first is postponed or within `TWICE_SECONDS` of it,
    is raised at once and ends the engine.

    Only in the main thread, where Python runs signal handlers, and only if SIGINT has a Python handler.
    """

    def __init__(self, end: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """end: ends the engine; must be safe to call again."""
        self._end, self._clock = end, clock
        self._previous: Any = None
        self._depth = 0
        self._first = float("-inf")
        self._pending: Any = None
        self._orderly: BaseException | None = None

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Postpone interrupts inside the block; one that is left at its end is raised there."""
        if not self._take_over():
            yield
            return
        self._depth += 1
        try:
            yield
            self.check()
        except KeyboardInterrupt as error:
            if not self.is_orderly(error):
                self._end()
            raise
        finally:
            self._depth -= 1
            self._orderly = None  # its traceback holds the engine
            self._give_back()

    def check(self) -> None:
        """Raise the postponed interrupt, if there is one."""
        if self._pending is None:
            return
        frame, self._pending = self._pending, None
        try:
            self._previous(signal.SIGINT, *frame)
        except KeyboardInterrupt as error:
            self._orderly = error
            raise

    def is_orderly(self, error: BaseException) -> bool:
        """Whether `check` raised it: between two steps, where all ranks agree."""
        return error is self._orderly

    def _take_over(self) -> bool:
        if threading.current_thread() is not threading.main_thread():
            return False
        current = signal.getsignal(signal.SIGINT)
        if current == self._take:
            return True
        if not callable(current):  # ignored, or the system's own
            return False
        self._previous = current
        signal.signal(signal.SIGINT, self._take)
        return True

    def _give_back(self) -> None:
        """Restore the handler, unless a second interrupt may follow soon: then the next one restores it."""
        is_over = self._clock() - self._first > TWICE_SECONDS
        if self._depth == 0 and is_over and signal.getsignal(signal.SIGINT) == self._take:
            signal.signal(signal.SIGINT, self._previous)

    def _take(self, number: int, frame: Any) -> None:
        """The signal handler."""
        now = self._clock()
        is_second = self._pending is not None or now - self._first <= TWICE_SECONDS
        if self._depth and not is_second:
            self._pending, self._first = (frame,), now
            return
        self._pending, self._first = None, float("-inf")
        signal.signal(signal.SIGINT, self._previous)
        try:
            if is_second and not self._depth:
                self._end()
        finally:
            self._previous(number, frame)
