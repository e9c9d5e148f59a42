"""Replicas of one job: rank assignment, rendezvous, and the connection of each leader to the HTTP process.

A replica is a torch world of its own: its ranks meet in a part of the job's store that others do not see, so nothing
of the engine has to know of the rest of the job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import os
import pickle
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from ulysses_infer.config import Config
from ulysses_infer.job.watchdog import Address
from ulysses_infer.parallel.groups import Rendezvous

STORE_SECONDS = 120.0
HELLO_SECONDS = 5.0
WORD_BYTES = 16


class Door(NamedTuple):
    """Where the HTTP process takes the lines of other replicas' leaders, and the word that lets one in."""

    host: str
    port: int
    word: bytes

    def enter(self, index: int) -> socket.socket:
        """The line of replica `index` to the HTTP process."""
        line = socket.create_connection((self.host, self.port), STORE_SECONDS)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.sendall(self.word + index.to_bytes(2, "little"))
        line.settimeout(None)
        return line


class DoorKeeper:
    """The HTTP process's side of the door."""

    def __init__(self, listener: socket.socket, word: bytes) -> None:
        self._listener, self._word = listener, word

    def let_in(self, count: int) -> dict[int, socket.socket]:
        """Wait for so many leaders; their lines by replica. Whoever does not know the word is turned away.

        Fewer come if `close` is called meanwhile, from another thread.
        """
        lines: dict[int, socket.socket] = {}
        while len(lines) < count:
            try:
                line = self._listener.accept()[0]
            except OSError:  # closed
                break
            index = self._ask(line)
            if index is None:
                line.close()
            else:
                lines[index] = line
        self._listener.close()
        return lines

    def close(self) -> None:
        """Let nobody in any more."""
        with contextlib.suppress(OSError):  # closed already
            self._listener.shutdown(socket.SHUT_RDWR)

    def _ask(self, line: socket.socket) -> int | None:
        """Which replica is at the door; None for a stranger."""
        line.settimeout(HELLO_SECONDS)
        try:
            said = _receive(line, WORD_BYTES + 2)
        except OSError:
            return None
        if not hmac.compare_digest(said[:WORD_BYTES], self._word):
            return None
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return int.from_bytes(said[WORD_BYTES:], "little")


def make_door(host: str) -> tuple[socket.socket, Door]:
    """A listener for the HTTP process to inherit, and what leaders need to find it."""
    listener = socket.create_server((host, 0))
    address, port = listener.getsockname()[:2]
    return listener, Door(address, port, secrets.token_bytes(WORD_BYTES))


def _receive(line: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count and (data := line.recv(count - len(received))):
        received += data
    return received


class News(NamedTuple):
    """What rank 0 of the job tells the leaders of the other replicas."""

    hub: Address
    door: Door


@dataclass(frozen=True)
class Replica:
    """The replica that a rank of the job belongs to."""

    index: int
    rank: int
    """The rank within the replica."""
    config: Config
    """The job's, as of one replica."""
    store: Any = None
    """The job's; None for a job of one replica, which the launcher's own environment brings together."""

    @classmethod
    def of(cls, config: Config, rank: int) -> Replica:
        """That of a rank of the job. With several, all ranks reach rank 0's store, at the launcher's address."""
        size = config.parallel.world_size
        if config.parallel.dp == 1:
            return cls(0, rank, config)
        from torch.distributed import TCPStore

        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=STORE_SECONDS),
        )
        parallel = dataclasses.replace(config.parallel, dp=1)
        return cls(rank // size, rank % size, dataclasses.replace(config, parallel=parallel), store)

    @property
    def meeting(self) -> Callable[[], Rendezvous] | None:
        """What `start_rank` calls to learn where the ranks meet; None where the launcher's environment says it."""
        return None if self.store is None else self._meet

    def _meet(self) -> Rendezvous:
        from torch.distributed import PrefixStore

        size = self.config.parallel.world_size
        return Rendezvous(PrefixStore(f"replica-{self.index}", self.store), self.rank, size)

    def tell(self, news: News) -> None:
        """Rank 0 of the job: let the other leaders know."""
        if self.store is not None:
            self.store.set("news", pickle.dumps(news))

    def hear(self) -> News:
        """Another leader: wait for what rank 0 has to tell."""
        news: News = pickle.loads(self.store.get("news"))
        return news
