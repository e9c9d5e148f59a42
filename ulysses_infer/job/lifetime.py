"""Ends a rank on a signal, or when its launcher is gone."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.5
SIGNAL_GRACE_SECONDS = 0.3  # a signal to the process group may end the launcher before it arrives here


class Guard:
    """Ends this process with exit code 128 + n on signal n, immediately, even while its main thread is in a collective.

    A command that has work to finish first installs its own callbacks (`take_over`), which run in the guard's thread.

    Python runs signal handlers in the main thread, between two bytecodes, so a rank that waits in a collective would
    never run them, and DeepSpeed's launcher would wait 30 s for each such rank. So the handler itself does nothing:
    Python's wake-up file descriptor notifies a thread, and the thread ends the process.

    The same thread watches the launcher: DeepSpeed's launcher forwards no signals, and once it or its helper is killed
    the ranks would run forever.

    Signals that arrive before `start` are handled then, so that the process can fork before it has threads.
    """

    def __init__(self, clean_up: Callable[[], None]) -> None:
        self._clean_up = clean_up
        self._before_end: Callable[[], None] = _nothing
        self._ending = threading.Event()
        self._on_signal: Callable[[int], None] = self.end
        self._on_orphaned: Callable[[], None] = lambda: self.end(signal.SIGTERM)
        self._attach(os.getpid())

    def after_fork(self) -> None:
        """In a child process: guard it, instead of its parent, which the launcher started."""
        self._attach(os.getppid())

    def _attach(self, launched: int) -> None:
        self._launcher = Launcher.of(launched)
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        for number in SIGNALS:
            signal.signal(number, _empty_handler)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)

    def start(self) -> None:
        """Handle signals from now on. Has no effect if called again."""
        if self._thread.ident is None:
            self._thread.start()

    def take_over(self, on_signal: Callable[[int], None], on_orphaned: Callable[[], None]) -> None:
        """Call `on_signal(number)` on each signal from now on, and `on_orphaned()` once if the launcher is gone."""
        self._on_signal, self._on_orphaned = on_signal, on_orphaned

    def before_end(self, action: Callable[[], None]) -> None:
        """Call `action()` in the guard's thread before this process ends, as to show what is finished."""
        self._before_end = action

    def end(self, number: int) -> None:
        """Clean up and end this process as signal `number` would."""
        self._ending.set()
        try:
            self._before_end()
        finally:
            self._clean_up()
            os._exit(128 + number)

    def give_way(self) -> None:
        """For the main thread, which has lost another rank: the signal that ended that rank may end this one too."""
        if self._ending.wait(SIGNAL_GRACE_SECONDS):
            self._thread.join()

    def _watch(self) -> None:
        while True:
            self._handle_signal(POLL_SECONDS)
            if self._launcher is not None and not self._launcher.is_alive():
                self._launcher = None
                self._handle_signal(SIGNAL_GRACE_SECONDS)
                self._on_orphaned()

    def _handle_signal(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for a signal and handle it."""
        if select.select([self._read], [], [], timeout)[0]:
            number = os.read(self._read, 1)[0]
            if number in SIGNALS:
                self._on_signal(number)


def end_with_launcher() -> None:
    """End this process when its launcher is gone: for programs on several ranks that have no `Guard`."""
    launcher = Launcher.of(os.getpid())
    if launcher is not None:
        threading.Thread(target=_watch_launcher, args=(launcher,), name="end-with-launcher", daemon=True).start()


def _watch_launcher(launcher: Launcher) -> None:
    while launcher.is_alive():
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _nothing() -> None:
    """The default `before_end`."""


def _empty_handler(number: int, frame: object) -> None:
    """Python writes to the wake-up descriptor only for signals that have a Python handler."""


class Launcher:
    """The `deepspeed` command above a rank and its helper, the parent of the ranks."""

    def __init__(self, launched: psutil.Process, helper: psutil.Process) -> None:
        command = helper.parent()
        # If the command was killed before this rank came here, the helper's parent is init.
        is_orphan = command is not None and command.pid == 1 and "deepspeed" not in " ".join(command.cmdline())
        self._launched, self._helper, self._command = launched, helper, None if is_orphan else helper.ppid()

    @classmethod
    def of(cls, launched: int) -> Launcher | None:
        """The launcher of a process; None if something else started it."""
        process = psutil.Process(launched)
        parent = process.parent()
        is_helper = parent is not None and "deepspeed.launcher.launch" in parent.cmdline()
        return cls(process, parent) if parent is not None and is_helper else None

    def is_alive(self) -> bool:
        """Whether the command and its helper still run: an orphaned process gets another parent at once."""
        try:
            return self._launched.ppid() == self._helper.pid and self._helper.ppid() == self._command
        except psutil.NoSuchProcess:
            return False
