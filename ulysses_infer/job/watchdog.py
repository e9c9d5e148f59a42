"""The watchdog: ends the whole job when one of its processes dies, hangs or gets stuck.

Collectives notice a dead process only when they next run, and a stopped one only after their timeout. So each process
keeps one connection to rank 0, the watchdog server, and a thread sends a heartbeat on it every half second. A closed
connection means that the process ended. Silence means that it hangs, unless the process has announced it. A step that
takes longer than `runtime.step_timeout` means that a collective is stuck. In each case the server sends the reason to
all clients (of the replica, if there are several), and every process that still runs dumps its stacks. Processes on
this host that do not exit are killed: a stopped process reacts to SIGKILL only, and DeepSpeed's launcher would wait 30
seconds for each.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, Protocol

import psutil

from ulysses_infer.host import host_identity

HEARTBEAT_SECONDS = 0.5
GRACE_SECONDS = 1.0  # for the other processes to exit before they are killed
HANDSHAKE_SECONDS = 5.0
MAX_HANDSHAKE_BYTES = 1024
EXIT_CODE = 1
# Message types. A message is one line of text: its type, then optional content.
HEARTBEAT, BYE, DRAIN, FAILED, STUCK, END = ".", "bye", "drain", "failed", "stuck", "end"
SILENT, BACK = "silent", "back"
DUMP, QUIET = "dump", "quiet"


class Address(NamedTuple):
    """Where the server listens, the token that authenticates clients, and the server's process."""

    host: str
    port: int
    auth_token: str
    process: tuple[str, int, float]


class HostProcess(NamedTuple):
    """A process; its start time tells it from a later one with the same pid."""

    host: str
    pid: int
    started: float

    @classmethod
    def this(cls) -> HostProcess:
        """This process."""
        return cls(host_identity(), os.getpid(), psutil.Process().create_time())

    def kill(self) -> None:
        """Send SIGKILL if the process still runs and is on this host."""
        if self.host != host_identity():
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.create_time() == self.started:
                process.kill()


@dataclass(eq=False)
class Connection:
    """One TCP connection to a peer, with the time of the last message received."""

    socket: socket.socket
    name: str = ""  # of the peer; empty until it is authenticated
    process: HostProcess | None = None
    replica: int | None = None  # of a rank, if the job has several
    deadline: float | None = None  # when the peer, which was told to end, is killed
    last_received: float = field(default_factory=time.monotonic)
    patience: float | None = None  # seconds of silence that the peer has announced
    unparsed: bytes = b""
    has_left: bool = False

    def send(self, *words: str) -> None:
        """Send a message. Errors are ignored: reading notices a broken connection."""
        with contextlib.suppress(OSError):
            self.socket.send(" ".join(words).encode() + b"\n")

    def receive(self) -> list[list[str]] | None:
        """The messages that arrived, each as [type] or [type, content]; None at the end of the connection."""
        try:
            data = self.socket.recv(4096)
        except OSError:
            return None
        if not data:
            return None
        self.last_received = time.monotonic()
        *lines, self.unparsed = (self.unparsed + data).split(b"\n")
        return [line.decode(errors="replace").split(" ", 1) for line in lines]

    def note_silence(self, kind: str, content: list[str]) -> None:
        """Take an announcement of silence, or of its end; ignores other messages."""
        if kind == SILENT:
            self.patience = float(content[0])
        elif kind == BACK:
            self.patience = None

    def is_too_silent(self, asked: float, timeout: float) -> bool:
        """Whether nothing came for more than `timeout` seconds, or those that the peer has announced.

        asked: the time before this process last looked for messages; later ones may be waiting, if it was held up.
        """
        return asked - self.last_received > max(timeout, self.patience or 0.0)

    def close(self) -> None:
        """Close the connection and ignore this peer from now on."""
        self.has_left = True
        self.socket.close()


def _ignore() -> None:
    """The default `on_drain`."""


class Watchdog(Protocol):
    """What a process that runs steps needs of the watchdog, be it the server or a client."""

    def working(self) -> AbstractContextManager[None]:
        """Time the step that runs inside; it may take `runtime.step_timeout` seconds."""

    def silent(self, seconds: float) -> AbstractContextManager[None]:
        """Announce that this process may send nothing for `seconds` inside: a call that keeps Python's global lock."""

    def announce_drain(self) -> None:
        """Announce that the job is shutting down normally."""

    def fail(self, reason: str) -> NoReturn:
        """End the job. Does not return."""


class StepTimer:
    """Base of server and client: times the current step."""

    def __init__(self, step_timeout: float | None) -> None:
        self._step_timeout = step_timeout
        self._step_started: float | None = None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Time the step that runs inside; it may take `step_timeout` seconds."""
        self._step_started = time.monotonic()
        yield
        self._step_started = None

    def overdue_step(self) -> str | None:
        """An error message if the current step has exceeded `step_timeout`, else None."""
        started, limit = self._step_started, self._step_timeout
        if limit is None or started is None or time.monotonic() - started <= limit:
            return None
        return f"a step has taken more than {limit:g} s (runtime.step_timeout)"


class WatchdogClient(StepTimer):
    """The side of every other process.

    When the job or the process's replica fails, `on_end(reason)` is called in the client's thread. With None the
    process exits, after dumping its stacks if the server asks for them. When the job starts to shut down,
    `on_drain()` is called there. `replica`: the one that a rank belongs to, if the job has several.
    """

    def __init__(
        self,
        address: Address,
        name: str,
        timeout: float,
        on_end: Callable[[str], None] | None = None,
        step_timeout: float | None = None,
        replica: int | None = None,
    ) -> None:
        super().__init__(step_timeout)
        self.on_drain: Callable[[], None] = _ignore
        self._name, self._timeout, self._on_end = name, timeout, on_end
        self._server_process = HostProcess(*address.process)
        self._server = Connection(socket.create_connection((address.host, address.port), HANDSHAKE_SECONDS))
        self._server.socket.settimeout(None)
        this = HostProcess.this()
        fields = [name, this.host, str(this.pid), repr(this.started), "" if replica is None else str(replica)]
        self._server.send(address.auth_token, "\t".join(fields))
        self.is_draining = False
        """Whether the job is shutting down normally."""
        self._left = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def report(self, reason: str) -> None:
        """Send the server the reason why this process is about to exit."""
        self._left.set()
        self._send_failure(reason)

    @contextlib.contextmanager
    def silent(self, seconds: float) -> Iterator[None]:
        """Announce that this process may send nothing for `seconds` inside: a call that keeps Python's global lock."""
        self._server.send(SILENT, str(seconds))
        try:
            yield
        finally:
            self._server.send(BACK)

    def announce_drain(self) -> None:
        """Have the server announce a normal shutdown to all processes."""
        self._server.send(DRAIN)

    def wait(self) -> None:
        """Wait until the job has ended normally."""
        self._left.wait()

    def fail(self, reason: str) -> NoReturn:
        """Report a failure to the server, which ends the job and this process. Does not return."""
        self._send_failure(reason)
        time.sleep(self._timeout)
        os._exit(EXIT_CODE)

    def leave(self) -> None:
        """Disconnect before a normal exit."""
        self._left.set()
        self._server.send(BYE)

    def _send_failure(self, reason: str) -> None:
        self._server.send(FAILED, " ".join(reason.split()))

    def _watch(self) -> None:
        while not self._left.is_set():
            self._server.send(HEARTBEAT)
            overdue = self.overdue_step()
            if overdue is not None:
                self._server.send(STUCK, overdue)
            asked = time.monotonic()
            if select.select([self._server.socket], [], [], HEARTBEAT_SECONDS)[0]:
                self._handle(self._server.receive())
            silence = time.monotonic() - self._server.last_received
            if self._server.is_too_silent(asked, self._timeout) and not self._left.is_set():
                self._end(f"rank 0 has not answered for {silence:.0f} s", dump=True, kill=True)

    def _handle(self, messages: list[list[str]] | None) -> None:
        if messages is None:
            if not self._left.is_set():
                # After a long silence the server hung, and another client killed it before this one did.
                hung = time.monotonic() - self._server.last_received > self._timeout / 2
                self._end("rank 0 ended unexpectedly", dump=hung)
            return
        for kind, *content in messages:
            self._server.note_silence(kind, content)
            if kind == BYE:
                self._left.set()
            elif kind == DRAIN:
                self.is_draining = True
                self.on_drain()
            elif kind == END:
                dump, _, reason = content[0].partition(" ")
                self._end(reason, dump=dump == DUMP)

    def _end(self, reason: str, dump: bool = False, kill: bool = False) -> None:
        self._left.set()
        if dump:
            dump_stacks(self._name)
        if kill:
            self._server_process.kill()
        if self._on_end is None:
            os._exit(EXIT_CODE)
        self._on_end(reason)


def dump_stacks(name: str) -> None:
    """Write the stacks of all threads of this process to standard error in a single write."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = f"--- stacks of {name} (process {os.getpid()}) ---\n".encode() + file.read()
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), text)
