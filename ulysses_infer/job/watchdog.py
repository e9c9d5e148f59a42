"""The watchdog: ends the whole job when one of its processes dies, hangs or gets stuck.

Collectives find a process that is gone only when they next run, and one that is stopped only after their time limit.
So each process keeps one connection to rank 0 (the hub), on which a thread says something every half second. A
connection that closes means a process that ended, silence one that hangs, and a step that takes longer than
`runtime.step_timeout` a collective that is wedged. In all three cases the hub tells everyone why, each process that
can still do so writes down where it was, and those of this host that cannot leave are killed: a stopped process
answers no signal but SIGKILL, and DeepSpeed's launcher would wait 30 seconds for each.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hmac
import os
import secrets
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

BEAT_SECONDS = 0.5
GRACE_SECONDS = 1.0  # for the others to leave before they are killed
HELLO_SECONDS = 5.0
MOST_HELLO_BYTES = 1024
FAILURE = 1
BEAT, BYE, DRAIN, FAILED, STUCK, END = ".", "bye", "drain", "failed", "stuck", "end"
DUMP, QUIET = "dump", "quiet"


class Address(NamedTuple):
    """Where the hub is, the word that lets one in, and who it is."""

    host: str
    port: int
    word: str
    process: tuple[str, int, float]


class HostProcess(NamedTuple):
    """A process, told from a later one with its number; only those of this host can be ended from here."""

    host: str
    pid: int
    started: float

    @classmethod
    def this(cls) -> HostProcess:
        """This process."""
        return cls(host_identity(), os.getpid(), psutil.Process().create_time())

    def kill(self) -> None:
        """End it for certain, if it is on this host and still there."""
        if self.host != host_identity():
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.create_time() == self.started:
                process.kill()


@dataclass(eq=False)
class _Line:
    """One connection, a line of text a message, and when something last came."""

    connection: socket.socket
    name: str = ""
    process: HostProcess | None = None
    heard: float = field(default_factory=time.monotonic)
    unread: bytes = b""
    has_left: bool = False

    def say(self, *words: str) -> None:
        """Send a line. One that cannot be sent is not missed: the connection's end is noticed by reading."""
        with contextlib.suppress(OSError):
            self.connection.send(" ".join(words).encode() + b"\n")

    def read(self) -> list[list[str]] | None:
        """The lines that came, each as its first word and the rest; None at the end of the connection."""
        try:
            data = self.connection.recv(4096)
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [line.decode(errors="replace").split(" ", 1) for line in lines]


def _nothing(reason: str) -> None:
    """Nobody to tell."""


class Watchdog(Protocol):
    """What a process that runs steps needs of its end of the heartbeat, hub or member."""

    def working(self) -> AbstractContextManager[None]:
        """A step runs inside; it may take `runtime.step_timeout` seconds."""

    def announce_drain(self) -> None:
        """The job is ending in order."""

    def fail(self, reason: str) -> NoReturn:
        """End the job. Does not return."""


class WatchdogServer:
    """Rank 0's end. `timeout`: seconds of silence that count as a hang. `step_timeout`: the longest a step may take.

    `on_end(reason)` is called, in the hub's thread, before the processes are told; a second later this one is gone.
    """

    def __init__(self, bind: str, timeout: float, step_timeout: float) -> None:
        self._timeout, self._step_timeout = timeout, step_timeout
        self.on_end: Callable[[str], None] = _nothing
        self._listener = socket.create_server((bind, 0))
        self._word = secrets.token_hex(16)
        self._lines: list[_Line] = []
        self._busy_since: float | None = None
        self._failure: tuple[str, bool] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def address(self) -> Address:
        """What members need to connect."""
        host, port = self._listener.getsockname()[:2]
        return Address(host, port, self._word, HostProcess.this())

    @property
    def members(self) -> list[str]:
        """Names of those connected."""
        return [line.name for line in self._lines if line.name and not line.has_left]

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """A step runs inside; it may take `step_timeout` seconds."""
        self._busy_since = time.monotonic()
        yield
        self._busy_since = None

    def announce_drain(self) -> None:
        """The job is ending in order: a launcher that goes away from now on is no reason to stop."""
        self._tell(DRAIN)

    def fail(self, reason: str, dump: bool = False) -> NoReturn:
        """End the job for `reason`. Does not return: the hub's thread ends this process. Any thread may call it."""
        if self._failure is None:
            self._failure = reason, dump
        self._thread.join()
        os._exit(FAILURE)

    def leave(self, seconds: float) -> None:
        """The job is over, in order: everyone may leave, and who has not after `seconds` is ended."""
        self._tell(BYE)
        deadline = time.monotonic() + seconds
        while self.members and time.monotonic() < deadline:
            time.sleep(0.01)
        self._stopped.set()
        self._thread.join()
        for line in self._lines:
            if line.process is not None and not line.has_left:
                line.process.kill()
            line.connection.close()
        self._listener.close()

    def kill_members(self) -> None:
        """End every member of this host at once."""
        for line in self._lines:
            if line.process is not None:
                line.process.kill()

    def _tell(self, *words: str) -> None:
        for line in list(self._lines):
            line.say(*words)

    def _watch(self) -> None:
        last_beat = 0.0
        while not self._stopped.is_set():
            if time.monotonic() - last_beat >= BEAT_SECONDS:
                self._tell(BEAT)
                last_beat = time.monotonic()
            self._listen()
            found = self._failure or self._find_failure()
            if found is not None and not self._stopped.is_set():
                self._end(*found)

    def _listen(self) -> None:
        connections: dict[socket.socket, _Line] = {line.connection: line for line in self._lines if not line.has_left}
        ready = select.select([self._listener, *connections], [], [], BEAT_SECONDS / 5)[0]
        for connection in ready:
            if connection is self._listener:
                self._lines.append(_Line(self._listener.accept()[0]))
            else:
                self._take(connections[connection])

    def _take(self, line: _Line) -> None:
        messages = line.read()
        if messages is None:
            self._take_end(line)
            return
        for word, *rest in messages:
            if not line.name:
                self._welcome(line, word, *rest)
            elif word == BYE:
                line.has_left = True
                line.connection.close()
                return
            elif word in (FAILED, STUCK):
                self._failure = self._failure or (f"{line.name} failed: {rest[0]}", word == STUCK)

    def _take_end(self, line: _Line) -> None:
        line.has_left = True
        line.connection.close()
        if line.name:
            self._failure = self._failure or (f"{line.name} ended unexpectedly", False)
        else:
            self._lines.remove(line)

    def _welcome(self, line: _Line, word: str, rest: str = "") -> None:
        """Let in who knows the word; whoever else found the port is shown the door."""
        fields = rest.split("\t")
        if not hmac.compare_digest(word.encode(), self._word.encode()) or len(fields) != 4:
            line.connection.close()
            self._lines.remove(line)
            return
        name, host, pid, started = fields
        line.process = HostProcess(host, int(pid), float(started))
        line.name = name

    def _find_failure(self) -> tuple[str, bool] | None:
        now = time.monotonic()
        for line in list(self._lines):
            silent = now - line.heard
            if line.name and not line.has_left and silent > self._timeout:
                return f"{line.name} has not answered for {silent:.0f} s", True
            if not line.name and (silent > HELLO_SECONDS or len(line.unread) > MOST_HELLO_BYTES):
                line.connection.close()
                self._lines.remove(line)
        busy_since = self._busy_since
        if busy_since is not None and now - busy_since > self._step_timeout:
            return f"a step has taken more than {self._step_timeout:g} s (runtime.step_timeout)", True
        return None

    def _end(self, reason: str, dump: bool) -> NoReturn:
        """Tell everyone why, give them a moment, and make sure of those of this host."""
        print(f"error: the engine ended: {reason}", file=sys.stderr, flush=True)
        self.on_end(reason)
        self._tell(END, DUMP if dump else QUIET, reason)
        if dump:
            dump_stacks("rank 0")
        deadline = time.monotonic() + GRACE_SECONDS
        waiting = [line for line in self._lines if line.process is not None and not line.has_left]
        while waiting and time.monotonic() < deadline:
            for connection in select.select([line.connection for line in waiting], [], [], 0.05)[0]:
                waiting = [line for line in waiting if line.connection is not connection or line.read() is not None]
        for line in waiting:
            if line.process is not None:
                line.process.kill()
        os._exit(FAILURE)


class WatchdogClient:
    """Any other process's end. `on_end(reason)` is called, in its thread, when the job has failed; with None the
    process then ends, after writing down where it was if the hub wants to know."""

    def __init__(
        self,
        address: Address,
        name: str,
        timeout: float,
        on_end: Callable[[str], None] | None = None,
        step_timeout: float | None = None,
    ) -> None:
        self._name, self._timeout, self._on_end, self._step_timeout = name, timeout, on_end, step_timeout
        self._busy_since: float | None = None
        self._hub = HostProcess(*address.process)
        self._line = _Line(socket.create_connection((address.host, address.port), HELLO_SECONDS))
        self._line.connection.settimeout(None)
        this = HostProcess.this()
        self._line.say(address.word, "\t".join([name, this.host, str(this.pid), repr(this.started)]))
        self.is_draining = False
        """Whether the job is ending in order."""
        self._left = threading.Event()
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def report(self, reason: str) -> None:
        """Tell the hub why this process is about to end."""
        self._left.set()
        self._line.say(FAILED, " ".join(reason.split()))

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """A step runs inside; it may take `step_timeout` seconds."""
        self._busy_since = time.monotonic()
        yield
        self._busy_since = None

    def announce_drain(self) -> None:
        """The hub knows already: it is where draining starts."""

    def fail(self, reason: str) -> NoReturn:
        """Tell the hub, which ends the job and so this process. Does not return."""
        self._line.say(FAILED, " ".join(reason.split()))
        time.sleep(self._timeout)
        os._exit(FAILURE)

    def leave(self) -> None:
        """This process ends in order."""
        self._left.set()
        self._line.say(BYE)

    def _watch(self) -> None:
        while not self._left.is_set():
            self._line.say(BEAT)
            busy_since, limit = self._busy_since, self._step_timeout
            if limit is not None and busy_since is not None and time.monotonic() - busy_since > limit:
                self._line.say(STUCK, f"a step has taken more than {limit:g} s (runtime.step_timeout)")
            if select.select([self._line.connection], [], [], BEAT_SECONDS)[0]:
                self._take(self._line.read())
            silent = time.monotonic() - self._line.heard
            if silent > self._timeout and not self._left.is_set():
                self._end(f"rank 0 has not answered for {silent:.0f} s", dump=True, kill=True)

    def _take(self, messages: list[list[str]] | None) -> None:
        if messages is None:
            if not self._left.is_set():
                # Silent for some time before, it hung, and another member was quicker to end it.
                hung = time.monotonic() - self._line.heard > self._timeout / 2
                self._end("rank 0 ended unexpectedly", dump=hung)
            return
        for word, *rest in messages:
            if word == BYE:
                self._left.set()
            elif word == DRAIN:
                self.is_draining = True
            elif word == END:
                dump, _, reason = rest[0].partition(" ")
                self._end(reason, dump=dump == DUMP)

    def _end(self, reason: str, dump: bool = False, kill: bool = False) -> None:
        self._left.set()
        if dump:
            dump_stacks(self._name)
        if kill:
            self._hub.kill()
        if self._on_end is None:
            os._exit(FAILURE)
        self._on_end(reason)


def dump_stacks(name: str) -> None:
    """Where every thread of this process is, on standard error in one piece."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = f"--- stacks of {name} (process {os.getpid()}) ---\n".encode() + file.read()
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), text)
