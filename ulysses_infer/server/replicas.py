"""Replicas of one job: rank assignment, rendezvous, and the connection of each leader to the HTTP process.

A replica is a torch world of its own: its ranks meet in a store of their leader, so nothing of the engine has to know
of the rest of the job, and no replica needs another once it is up.
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
from ulysses_infer.host import ranks_on_this_host
from ulysses_infer.job.watchdog import Address
from ulysses_infer.model.sampling.seeds import derive_seed
from ulysses_infer.parallel.groups import Rendezvous

STORE_SECONDS = 120.0
HANDSHAKE_SECONDS = 5.0
TOKEN_BYTES = 16


class LeaderEndpoint(NamedTuple):
    """Where the HTTP process accepts the leaders of several replicas, and the token that authenticates them."""

    host: str
    port: int
    auth_token: bytes

    def connect(self, index: int) -> socket.socket:
        """Connects replica `index` to the HTTP process; returns the socket."""
        connection = socket.create_connection((self.host, self.port), STORE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(self.auth_token + index.to_bytes(2, "little"))
        connection.settimeout(None)
        return connection


class LeaderAcceptor:
    """The HTTP process's side of the endpoint."""

    def __init__(self, listener: socket.socket, auth_token: bytes) -> None:
        self._listener, self._auth_token = listener, auth_token

    def accept(self, count: int) -> dict[int, socket.socket]:
        """Waits for this many leaders; returns their sockets by replica. Connections without the auth token are
        refused.

        Returns fewer if `close` is called meanwhile from another thread.
        """
        connections: dict[int, socket.socket] = {}
        while len(connections) < count:
            try:
                connection = self._listener.accept()[0]
            except OSError:  # closed
                break
            index = self._index_of(connection)
            if index is None:
                connection.close()
            else:
                connections[index] = connection
        self._listener.close()
        return connections

    def close(self) -> None:
        """Accept no more connections."""
        with contextlib.suppress(OSError):  # already closed
            self._listener.shutdown(socket.SHUT_RDWR)

    def _index_of(self, connection: socket.socket) -> int | None:
        """The replica that connected, or None if it does not authenticate."""
        connection.settimeout(HANDSHAKE_SECONDS)
        try:
            received = _receive(connection, TOKEN_BYTES + 2)
        except OSError:
            return None
        if not hmac.compare_digest(received[:TOKEN_BYTES], self._auth_token):
            return None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return int.from_bytes(received[TOKEN_BYTES:], "little")


def make_endpoint(host: str) -> tuple[socket.socket, LeaderEndpoint]:
    """A listener for the HTTP process to inherit, and what leaders need to find it."""
    listener = socket.create_server((host, 0))
    address, port = listener.getsockname()[:2]
    return listener, LeaderEndpoint(address, port, secrets.token_bytes(TOKEN_BYTES))


def rendezvous_host() -> str:
    """The address at which the other ranks reach this host, which has rank 0."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return "127.0.0.1" if ranks_on_this_host(world_size) == world_size else os.environ["MASTER_ADDR"]


def _own_address(peer: str) -> str:
    """The address of this host on the network of `peer`. Sends nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(peer, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        own: str = probe.getsockname()[0]
        return own


def _receive(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count and (data := connection.recv(count - len(received))):
        received += data
    return received


def _config_of_replica(config: Config, index: int) -> Config:
    """The config of one replica of several. A seed of the job gives each replica a seed of its own, because equal ones
    would make the replicas draw the same random numbers."""
    seed = None if config.model.seed is None else derive_seed(config.model.seed, index)
    model = dataclasses.replace(config.model, seed=seed)
    return dataclasses.replace(config, model=model, parallel=dataclasses.replace(config.parallel, dp=1))


class StartupInfo(NamedTuple):
    """What the coordinator of the job sends to the leaders of the replicas."""

    watchdog: Address
    endpoint: LeaderEndpoint


@dataclass(frozen=True)
class Replica:
    """The replica of a rank of the job."""

    index: int
    rank: int
    """The rank within the replica."""
    config: Config
    """The job's config, with dp = 1 if it has several replicas."""
    store: Any = None
    """The job's store; None for a job of one replica, which uses the launcher's environment directly."""

    @classmethod
    def of(cls, config: Config, rank: int) -> Replica:
        """The replica of one rank of the job. If there are several, all ranks connect to rank 0's store at the
        launcher's address."""
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
        index = rank // size
        return cls(index, rank % size, _config_of_replica(config, index), store)

    @property
    def meeting(self) -> Callable[[], Rendezvous] | None:
        """For `start_rank`: returns the rendezvous of the replica's ranks. None if the launcher's environment defines
        it."""
        return None if self.store is None else self._meet

    def _meet(self) -> Rendezvous:
        from torch.distributed import TCPStore

        key, timeout = f"replica-{self.index}", timedelta(seconds=STORE_SECONDS)
        if self.rank == 0:
            host = _own_address(os.environ["MASTER_ADDR"])
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            self.store.set(key, f"{host} {store.port}")
        else:
            host, port = self.store.get(key).decode().split()
            store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
        return Rendezvous(store, self.rank, self.config.parallel.world_size)

    def publish(self, startup_info: StartupInfo) -> None:
        """On rank 0 of the job: publish the startup info to all leaders."""
        self.store.set("startup_info", pickle.dumps(startup_info))

    def receive(self) -> StartupInfo:
        """On a leader: wait for the startup info that rank 0 publishes."""
        startup_info: StartupInfo = pickle.loads(self.store.get("startup_info"))
        return startup_info
