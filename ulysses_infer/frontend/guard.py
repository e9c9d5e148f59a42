"""A rank that ends when it should: at a signal, and when whatever launched it is gone."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.5


class Guard:
    """Ends this process with 128 + n at signal n, at once, even while its main thread waits for other ranks.

    Python runs signal handlers in the main thread, between two bytecodes: a rank that waits in a collective would
    never get to them, and DeepSpeed's launcher would give each such rank 30 s. So the handler proper does nothing;
    Python's wake-up descriptor tells a thread of the signal, and the thread ends the process.

    The same thread watches what launched this rank: DeepSpeed's launcher passes no signal on, and once it or its
    helper is killed the ranks would run for ever.
    """

    def __init__(self, clean_up: Callable[[], None]) -> None:
        self._clean_up = clean_up
        self._launcher = Launcher.of_this_process()
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        for number in SIGNALS:
            signal.signal(number, _leave_it_to_the_thread)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="guard", daemon=True).start()

    def _watch(self) -> None:
        while self._launcher is None or self._launcher.is_alive():
            if select.select([self._read], [], [], POLL_SECONDS)[0]:
                self._end(os.read(self._read, 1)[0])
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if number in SIGNALS:
            self._clean_up()
            os._exit(128 + number)


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
