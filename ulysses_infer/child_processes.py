"""Processes end with the process that started them, however that one ends.

Run as a program, this file is the keeper: it waits until its parent is gone and then ends what the parent started.
It needs only the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

VARIABLE = "ULYSSES_INFER_STARTED_BY"
"""Environment variable: the tokens of the processes with a keeper that started this one, directly or indirectly."""
TITLES_KEEP_ENVIRONMENT = "SPT_NOENV"
"""Environment variable: tells setproctitle, which Ray and vLLM use, not to write titles over the environment, by which
the keeper finds processes whose parents ended before it looked."""
GRACE_SECONDS = 3.0  # for the processes to end by themselves: ranks report why they end, a server answers its clients
LIMIT_SECONDS = 30.0  # for processes that no signal ends
POLL_SECONDS = 0.2
PARENT_POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Those of torchrun, DeepSpeed and accelerate."""

_kept_by: list[int] = []  # the process that has a keeper; a fork of it does not


def path_with_this_package() -> str:
    """PYTHONPATH for a process that imports this package."""
    return os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))


def variables_of_another_job() -> dict[str, str]:
    """The environment of a process that imports this package and does not belong to the launcher of this one."""
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return {**own, "PYTHONPATH": path_with_this_package()}


def end_children_with_this_process() -> None:
    """Have a keeper end every process that this one starts from now on, and their descendants, when this one ends.

    Commands, tools and test sessions call it before they start a process. The keeper finds the processes by an
    environment variable, which they inherit, and by their parents. So they need not cooperate: launchers and other
    foreign programs, stopped processes (SIGSTOP) and new sessions are included. Does nothing on systems other than
    Linux.
    """
    if sys.platform != "linux" or os.getpid() in _kept_by:
        return
    token = secrets.token_hex(8)
    subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), token],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # a signal from the terminal is not for the keeper
    ).returncode = 0  # it outlives this process, which never waits for it
    os.environ[VARIABLE] = " ".join(filter(None, [os.environ.get(VARIABLE), token]))
    os.environ[TITLES_KEEP_ENVIRONMENT] = "1"
    _kept_by[:] = [os.getpid()]


def end_with_parent(parent: int, patience: float = 0.0) -> None:
    """End this process when its parent ends for any reason, `patience` seconds later.

    A thread polls, because the kernel's parent-death signal arrives as soon as the *thread* that started this process
    ends.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_SECONDS)
        time.sleep(patience)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel kills the new process when the thread that starts it ends. Use the main thread."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def send(pid: int, number: int, group: bool = False) -> None:
    """Send a signal to a process or its group, and have a stopped one take it. Does nothing if it has exited."""
    with contextlib.suppress(ProcessLookupError):
        for each in [number] if number == signal.SIGKILL else [number, signal.SIGCONT]:
            (os.killpg if group else os.kill)(pid, each)


# -- the keeper ----------------------------------------------------------------------------------------------------


class _Process(NamedTuple):
    pid: int
    started: str
    """In the kernel's ticks: tells it from a later process with the same id."""


class _State(NamedTuple):
    letter: str
    parent: int
    started: str


def _keep(parent: int, token: str) -> None:
    _await_end(parent)
    ended = time.monotonic()
    known: set[_Process] = set()
    while (known := _started_by(token, known)) and time.monotonic() < ended + LIMIT_SECONDS:
        is_over = time.monotonic() >= ended + GRACE_SECONDS
        for process in known:
            state = _state(process.pid)
            if is_over or (state is not None and state.letter == "T"):  # a stopped process cannot end by itself
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process.pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _await_end(parent: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # pidfd_open needs Linux 5.3
        watched = os.pidfd_open(parent)
        if os.getppid() == parent:
            select.select([watched], [], [])
            return
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)


def _started_by(token: str, known: set[_Process]) -> set[_Process]:
    """The running processes with `token` in their environment, those in `known`, and the descendants of both.

    A descendant may have overwritten its environment, so it stays known after its parent has ended.
    """
    states = {int(entry): _state(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()}
    running = {pid: state for pid, state in states.items() if state is not None and state.letter not in "ZX"}
    pids = {pid for pid, state in running.items() if (pid, state.started) in known or _is_marked(pid, token)}
    size = -1
    while size != len(pids):
        size = len(pids)
        pids |= {pid for pid, state in running.items() if state.parent in pids}
    return {_Process(pid, running[pid].started) for pid in pids - {os.getpid()}}


def _is_marked(pid: int, token: str) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return False
    return any(each.startswith(f"{VARIABLE}=".encode()) and token.encode() in each for each in variables)


def _state(pid: int) -> _State | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:  # it has ended
        return None
    return _State(fields[0], int(fields[1]), fields[19])


if __name__ == "__main__":
    _keep(int(sys.argv[1]), sys.argv[2])
