"""A rank in a child process of the process that a launcher started.

Launchers end a job as soon as one of their processes fails. With several replicas the others must go on, so the
launched process does nothing but keep the place of its rank: it stays until the job has ended.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading

from ulysses_infer.child_processes import die_with_parent, send
from ulysses_infer.job.lifetime import Guard
from ulysses_infer.job.watchdog import Address, WatchdogClient


class KeptRank:
    """The rank's side."""

    def __init__(self, startup: int, address: int) -> None:
        """startup: the pipe from the keeper; address: the pipe to it."""
        self._startup, self._address = startup, address

    def receive(self) -> bytes:
        """What the keeper has sent, once it has sent everything; empty if it has ended before."""
        with open(self._startup, "rb") as pipe:
            return pipe.read()

    def report_serving(self, watchdog: Address) -> None:
        """From now on the job outlives this rank, and the keeper waits for the end of the job."""
        with open(self._address, "wb") as pipe:
            pipe.write(pickle.dumps(watchdog))


class Keeper:
    """The launched process's side: waits for the rank, its child `pid`."""

    def __init__(self, pid: int, startup: int, address: int) -> None:
        """startup: the pipe to the rank; address: the pipe from it."""
        self._pid, self._startup, self._address = pid, startup, address
        self.status: int | None = None
        """The exit status of the rank, 128 + n for signal n; None while it runs."""

    def send(self, data: bytes) -> None:
        """Send the rank what it needs to start; call it once at most."""
        with contextlib.suppress(BrokenPipeError), open(self._startup, "wb") as pipe:
            pipe.write(data)

    def watchdog(self) -> Address | None:
        """Waits until the rank serves and returns the address that it reports; None if it ended before."""
        with open(self._address, "rb") as pipe:
            data = pipe.read()
        return pickle.loads(data) if data else None

    def signal(self, number: int) -> None:
        """Pass a signal on to the rank, if it runs."""
        if self.status is None:
            send(self._pid, number)

    def wait(self) -> int:
        """Waits until the rank has ended; returns its exit status."""
        if self.status is None:
            code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            self.status = code if code >= 0 else 128 - code
        return self.status


def fork_rank(guard: Guard) -> Keeper | KeptRank:
    """Go on in a child process as the rank, and in this one as its keeper. Call it before `guard` and other threads
    have started."""
    startup, startup_end = os.pipe()
    address, address_end = os.pipe()
    keeper = os.getpid()
    pid = os.fork()
    if pid:
        os.close(startup)
        os.close(address_end)
        return Keeper(pid, startup_end, address)
    die_with_parent()
    if os.getppid() != keeper:  # it ended before the kernel knew
        os._exit(1)
    os.close(startup_end)
    os.close(address)
    guard.after_fork()
    return KeptRank(startup, address_end)


def keep_place(keeper: Keeper, guard: Guard, name: str, replica: int, timeout: float, leave_seconds: float) -> int:
    """Wait for a rank, and if it fails after the job has started, for the end of the job; returns the exit status.

    timeout: of the watchdog. leave_seconds: how long this process may outlive a signal once the rank has ended.
    """

    def take(number: int) -> None:
        keeper.signal(number)
        timer = threading.Timer(leave_seconds, guard.end, (number,))
        timer.daemon = True
        timer.start()

    guard.take_over(take, _nothing)  # the rank watches the launcher, and ends if that is gone
    guard.start()
    status, watchdog = keeper.wait(), keeper.watchdog()
    if status == 0 or watchdog is None:
        return status
    try:
        client = WatchdogClient(watchdog, name, timeout, lambda _: os._exit(status), replica=replica)
    except OSError:  # the job has ended
        return status
    client.wait()
    client.leave()
    return 0


def _nothing() -> None:
    """The rank acts in this case."""
