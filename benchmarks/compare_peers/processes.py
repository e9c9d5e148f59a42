"""A worker process: started, measured, stopped while others are measured, ended with all that it started."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from benchmarks.compare_peers.environments import UnavailableError, last_error
from benchmarks.compare_peers.programs import Program
from benchmarks.compare_peers.protocol import Answer, Task, receive, send

ROOT = Path(__file__).resolve().parents[2]
SETTLE_SECONDS = 0.05
END_SECONDS = 5.0
POLL_SECONDS = 0.2


class Worker:
    """One running program. Between measurements it is stopped (SIGSTOP), so that busy-waiting costs nothing."""

    def __init__(self, name: str, program: Program, log: Path, seconds: float) -> None:
        """Start it and wait up to `seconds` for it to be ready. Raises `UnavailableError`."""
        self.name, self.log, self._seconds = name, log, seconds
        variables = os.environ | {"PYTHONUNBUFFERED": "1"} | program.variables
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        folder = tempfile.mkdtemp(prefix="peer-")
        address = os.path.join(folder, "socket")
        with socket.socket(socket.AF_UNIX) as listener, log.open("w") as file:
            listener.bind(address)
            listener.listen(1)
            listener.settimeout(POLL_SECONDS)
            self._process = subprocess.Popen(
                [*program.command, address],
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                self._connection = self._accept(listener, time.monotonic() + seconds)
                send(self._connection, program.options)
                self.version: str = self._receive()["version"]
            except BaseException:
                self._kill()
                raise
            finally:
                os.unlink(address)
                os.rmdir(folder)
        self._signal(signal.SIGSTOP)

    def measure(self, task: Task) -> Answer:
        """One measurement; the process must be resumed. Raises `UnavailableError` if it fails or takes too long."""
        send(self._connection, task)
        return self._receive()

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """The process runs inside, and is stopped afterwards."""
        self._signal(signal.SIGCONT)
        time.sleep(SETTLE_SECONDS)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """End it and all that it started."""
        processes = self._process_tree()  # while the process still lists its children
        self._signal(signal.SIGCONT)
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._kill()

    def _accept(self, listener: socket.socket, deadline: float) -> Connection:
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise UnavailableError(self._reason(f"it ended with code {self._process.returncode}"))
            with suppress(TimeoutError):
                return Connection(listener.accept()[0].detach())
        raise UnavailableError(self._reason("it did not start in time"))

    def _receive(self) -> Any:
        deadline = time.monotonic() + self._seconds
        while not select.select([self._connection], [], [], POLL_SECONDS)[0]:
            if self._process.poll() is not None:
                raise UnavailableError(self._reason(f"it ended with code {self._process.returncode}"))
            if time.monotonic() > deadline:
                raise UnavailableError(self._reason(f"no answer in {self._seconds:g} s"))
        try:
            message = receive(self._connection)
        except (EOFError, OSError) as error:
            raise UnavailableError(self._reason("it ended")) from error
        if "error" in message:
            raise UnavailableError(f"{message['error']} (its log: {self.log})")
        return message

    def _reason(self, what: str) -> str:
        said = last_error(self.log.read_text(encoding="utf-8", errors="replace"))
        return f"{what}; {said} (its log: {self.log})"

    def _process_tree(self) -> list[psutil.Process]:
        """The process and its descendants, parents first."""
        try:
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: int) -> None:
        for process in self._process_tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
