"""Ends a rank at a signal, or when its launcher is gone."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.5
SAME_MOMENT = 0.3  # a signal to the whole group ends the launcher a little before this process hears of it


class Guard:
    """Ends this process with 128 + n at signal n, at once, even while its main thread waits for other ranks.

    A command that has something to finish first takes over: it then hears of signals, in the guard's thread.

    Python runs signal handlers in the main thread, between two bytecodes: a rank that waits in a collective would
    never get to them, and DeepSpeed's launcher would give each such rank 30 s. So the handler proper does nothing;
    Python's wake-up descriptor tells a thread of the signal, and the thread ends the process.

    The same thread watches what launched this rank: DeepSpeed's launcher passes no signal on, and once it or its
    helper is killed the ranks would run for ever.
    """

    def __init__(self, clean_up: Callable[[], None]) -> None:
        self._clean_up = clean_up
        self._on_signal: Callable[[int], None] = self.end
        self._on_orphaned: Callable[[], None] = lambda: self.end(signal.SIGTERM)
        self._launcher = Launcher.of_this_process()
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        for number in SIGNALS:
            signal.signal(number, _leave_it_to_the_thread)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="guard", daemon=True).start()

    def take_over(self, on_signal: Callable[[int], None], on_orphaned: Callable[[], None]) -> None:
        """From now on a signal means `on_signal(number)`, and a launcher that is gone `on_orphaned()`, once."""
        self._on_signal, self._on_orphaned = on_signal, on_orphaned

    def end(self, number: int) -> None:
        """End this process now, as signal `number` would."""
        self._clean_up()
        os._exit(128 + number)

    def _watch(self) -> None:
        while True:
            self._listen(POLL_SECONDS)
            if self._launcher is not None and not self._launcher.is_alive():
                self._launcher = None
                self._listen(SAME_MOMENT)
                self._on_orphaned()

    def _listen(self, seconds: float) -> None:
        """Take the next signal, waiting for it so long."""
        if select.select([self._read], [], [], seconds)[0]:
            number = os.read(self._read, 1)[0]
            if number in SIGNALS:
                self._on_signal(number)


def _leave_it_to_the_thread(number: int, frame: object) -> None:
    """Without a handler of Python's the wake-up descriptor hears nothing."""


class Launcher:
    """The `deepspeed` command above this rank and its helper, the parent of the ranks."""

    def __init__(self, helper: psutil.Process) -> None:
        self._helper, self._command = helper, helper.ppid()

    @classmethod
    def of_this_process(cls) -> Launcher | None:
        """None for a rank that something else started."""
        parent = psutil.Process().parent()
        return cls(parent) if parent is not None and "deepspeed.launcher.launch" in parent.cmdline() else None

    def is_alive(self) -> bool:
        """Whether both are: a process whose parent ends gets another one at once."""
        try:
            return os.getppid() == self._helper.pid and self._helper.ppid() == self._command
        except psutil.NoSuchProcess:
            return False
