"""The watchdog's side of rank 0, or of the coordinator of several replicas."""

from __future__ import annotations

import hmac
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from ulysses_infer.job.watchdog import (
    BACK,
    BYE,
    DRAIN,
    DUMP,
    END,
    EXIT_CODE,
    FAILED,
    GRACE_SECONDS,
    HANDSHAKE_SECONDS,
    HEARTBEAT,
    HEARTBEAT_SECONDS,
    MAX_HANDSHAKE_BYTES,
    QUIET,
    SILENT,
    STUCK,
    Address,
    Connection,
    HostProcess,
    StepTimer,
    dump_stacks,
)


class Failure(NamedTuple):
    """Why the job or one replica ends."""

    reason: str
    dump: bool = False
    """Whether every process that ends dumps its stacks."""
    replica: int | None = None
    """None: the whole job ends."""
    status: int = EXIT_CODE
    """The exit status of this process, if the job ends."""


def _ignore(reason: str) -> None:
    """The default `on_end`."""


def _ignore_replica(index: int, reason: str) -> None:
    """The default `on_lost`."""


class WatchdogServer(StepTimer):
    """Rank 0's side of the watchdog.

    `timeout`: seconds of silence that count as a hang. `step_timeout`: the longest a step may take. When the job
    fails, `on_end(reason)` is called in the server's thread before the clients are notified; this process exits about
    a second later.

    `num_replicas`, `num_ranks`: of a job of several replicas, whose clients say which replica they belong to. Once all
    ranks have connected, the failure of a replica ends its processes only, unless no other is left; then
    `on_lost(index, reason)` is called in the server's thread.
    """

    def __init__(
        self, bind: str, timeout: float, step_timeout: float, num_replicas: int = 1, num_ranks: int = 1
    ) -> None:
        super().__init__(step_timeout)
        self._timeout, self._num_replicas, self._num_ranks = timeout, num_replicas, num_ranks
        self.on_end: Callable[[str], None] = _ignore
        self.on_lost: Callable[[int, str], None] = _ignore_replica
        self.is_draining = False
        """Whether the job is shutting down normally."""
        self._listener = socket.create_server((bind, 0))
        self._auth_token = secrets.token_hex(16)
        self._connections: list[Connection] = []
        self._failures: list[Failure] = []  # not handled yet
        self._joined = 0  # ranks that have connected
        self._lost: set[int] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @property
    def address(self) -> Address:
        """What clients need to connect."""
        host, port = self._listener.getsockname()[:2]
        return Address(host, port, self._auth_token, HostProcess.this())

    @property
    def is_complete(self) -> bool:
        """Whether all ranks of several replicas have connected."""
        return self._joined >= self._num_ranks

    @property
    def client_names(self) -> list[str]:
        """Names of the connected clients."""
        return [peer.name for peer in self._connections if peer.name and not peer.has_left]

    @contextmanager
    def silent(self, seconds: float) -> Iterator[None]:
        """Announce that this process may send nothing for `seconds` inside: a call that keeps Python's global lock."""
        self._broadcast(SILENT, str(seconds))
        try:
            yield
        finally:
            self._broadcast(BACK)

    def announce_drain(self) -> None:
        """Announce a normal shutdown: from now on the loss of a launcher is no reason to stop."""
        self.is_draining = True
        self._broadcast(DRAIN)

    def fail(self, reason: str, dump: bool = False, status: int = EXIT_CODE) -> NoReturn:
        """End the job. Does not return: the server's thread ends this process, with `status`. Thread-safe."""
        self._failures.append(Failure(reason, dump, status=status))
        self._thread.join()
        os._exit(status)

    def leave(self, seconds: float) -> None:
        """End the watchdog at a normal shutdown. Clients that have not left after `seconds` are killed."""
        self._broadcast(BYE)
        deadline = time.monotonic() + seconds
        while self.client_names and time.monotonic() < deadline:
            time.sleep(0.01)
        self._stopped.set()
        self._thread.join()
        for peer in self._connections:
            if peer.process is not None and not peer.has_left:
                peer.process.kill()
            peer.socket.close()
        self._listener.close()

    def kill_clients(self) -> None:
        """Kill every client on this host immediately."""
        for peer in self._connections:
            if peer.process is not None:
                peer.process.kill()

    def _broadcast(self, *words: str) -> None:
        for peer in list(self._connections):
            peer.send(*words)

    def _watch(self) -> None:
        last_heartbeat = 0.0
        while not self._stopped.is_set():
            if time.monotonic() - last_heartbeat >= HEARTBEAT_SECONDS:
                self._broadcast(HEARTBEAT)
                last_heartbeat = time.monotonic()
            asked = time.monotonic()
            self._receive()
            self._find_failures(asked)
            while self._failures and not self._stopped.is_set():
                self._handle_failure(self._failures.pop(0))

    def _receive(self) -> None:
        """Accept connections and handle messages."""
        peers = {peer.socket: peer for peer in self._connections if not peer.has_left}
        ready = select.select([self._listener, *peers], [], [], HEARTBEAT_SECONDS / 5)[0]
        for readable in ready:
            if readable is self._listener:
                self._connections.append(Connection(self._listener.accept()[0]))
            else:
                self._handle(peers[readable])

    def _handle(self, peer: Connection) -> None:
        messages = peer.receive()
        if messages is None:
            self._handle_disconnect(peer)
            return
        for kind, *content in messages:
            if not peer.name:
                self._authenticate(peer, kind, *content)
                continue
            peer.note_silence(kind, content)
            if kind == BYE:
                peer.close()
                return
            elif kind == DRAIN and not self.is_draining:
                self.announce_drain()
            elif kind in (FAILED, STUCK):
                self._failures.append(Failure(f"{peer.name} failed: {content[0]}", kind == STUCK, peer.replica))

    def _handle_disconnect(self, peer: Connection) -> None:
        peer.close()
        if peer.name:
            self._failures.append(Failure(f"{peer.name} ended unexpectedly", replica=peer.replica))
        else:
            self._connections.remove(peer)

    def _authenticate(self, peer: Connection, auth_token: str, content: str = "") -> None:
        """Accept a peer that sends the auth token; disconnect any other."""
        fields = content.split("\t")
        if not hmac.compare_digest(auth_token.encode(), self._auth_token.encode()) or len(fields) != 5:
            self._reject(peer)
            return
        name, host, pid, started, replica = fields
        peer.process = HostProcess(host, int(pid), float(started))
        peer.replica = int(replica) if replica else None
        peer.name = name
        self._joined += peer.replica is not None
        if self.is_draining:
            peer.send(DRAIN)

    def _reject(self, peer: Connection) -> None:
        peer.socket.close()
        self._connections.remove(peer)

    def _find_failures(self, asked: float) -> None:
        now = time.monotonic()
        for peer in list(self._connections):
            silence = now - peer.last_received
            if peer.deadline is not None and now > peer.deadline and not peer.has_left:
                self._kill(peer)
            elif peer.name and not peer.has_left and peer.is_too_silent(asked, self._timeout):
                self._failures.append(Failure(f"{peer.name} has not answered for {silence:.0f} s", True, peer.replica))
            elif not peer.name and (silence > HANDSHAKE_SECONDS or len(peer.unparsed) > MAX_HANDSHAKE_BYTES):
                self._reject(peer)
        overdue = self.overdue_step()
        if overdue is not None:
            self._failures.append(Failure(overdue, True))

    def _handle_failure(self, failure: Failure) -> None:
        index = failure.replica
        if index is None or not self.is_complete or len(self._lost | {index}) == self._num_replicas:
            self._end(failure)
        elif index not in self._lost:
            self._lost.add(index)
            self._end_replica(index, failure)

    def _end_replica(self, index: int, failure: Failure) -> None:
        """Have the processes of one replica exit; those that do not are killed."""
        print(f"error: replica {index} ended: {failure.reason}", file=sys.stderr, flush=True)
        self.on_lost(index, failure.reason)
        for peer in self._connections:
            if peer.replica == index and not peer.has_left:
                peer.send(END, DUMP if failure.dump else QUIET, failure.reason)
                peer.deadline = time.monotonic() + GRACE_SECONDS

    def _kill(self, peer: Connection) -> None:
        if peer.process is not None:
            peer.process.kill()
        peer.close()

    def _end(self, failure: Failure) -> NoReturn:
        """Notify all clients, wait briefly for them to exit, kill the rest on this host and exit."""
        print(f"error: the engine ended: {failure.reason}", file=sys.stderr, flush=True)
        self.on_end(failure.reason)
        self._broadcast(END, DUMP if failure.dump else QUIET, failure.reason)
        if failure.dump:
            dump_stacks("rank 0")
        deadline = time.monotonic() + GRACE_SECONDS
        waiting = [peer for peer in self._connections if peer.process is not None and not peer.has_left]
        while waiting and time.monotonic() < deadline:
            for readable in select.select([peer.socket for peer in waiting], [], [], 0.05)[0]:
                waiting = [peer for peer in waiting if peer.socket is not readable or peer.receive() is not None]
        for peer in waiting:
            if peer.process is not None:
                peer.process.kill()
        os._exit(failure.status)
