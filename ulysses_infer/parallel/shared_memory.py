"""Shared memory of a replica's ranks on one host.

It is an anonymous file (memfd) that rank 0 holds open until the other ranks have mapped it through /proc. It has no
name, so the kernel frees it when the last process ends, even after a crash.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from ulysses_infer.arithmetic import round_up
from ulysses_infer.host import host_identity
from ulysses_infer.native.library import NativeUnavailableError, open_library
from ulysses_infer.parallel.shared_group import SharedMemoryEndpoint, SharedMemoryGroup, SharedMemoryMailbox, declare

LINE_BYTES = 128  # two cache lines, because some processors fetch them in pairs
AUTH_TOKEN_BYTES = 32
SLOT_BYTES, NUM_SLOTS = 1 << 20, 2
MAIL_SLOT_BYTES, NUM_MAIL_SLOTS = 16 << 10, 32
NANOSECONDS = 1_000_000_000
# How long a waiting rank spins (unless its peer was last seen on the same core), and then yields its core in a loop,
# before it sleeps. So waiting is harmless where ranks share cores.
SPIN_NS, YIELD_NS = 20_000, 2_000_000
CROWDED_SPIN_NS, CROWDED_YIELD_NS = 5_000, 100_000  # where ranks outnumber cores
T = TypeVar("T", bound=SharedMemoryEndpoint)


class SharedMemoryUnavailableError(Exception):
    """The ranks cannot share memory; raised on all of them, with the reason."""


class MemoryRendezvous(NamedTuple):
    """What ranks exchange before they share memory."""

    host: str
    process: int
    file: int
    """File descriptor of the memory in rank 0's process."""
    auth_token: bytes
    """The first bytes of that memory."""
    problem: str = ""
    """Why this rank cannot take part."""


class SharedMemory:
    """This rank's mapping of the memory: an auth token, one flag per rank, then the process groups and the mailbox."""

    def __init__(self, library: ctypes.CDLL, base: int, size: int, rank: int, processes: Sequence[int]) -> None:
        self._library, self._base, self._rank, self._processes = library, base, rank, list(processes)
        self._next = _head_bytes(len(processes))
        self._endpoints: list[SharedMemoryEndpoint] = []
        self._handles: list[int] = []
        self._release = weakref.finalize(self, _release, library, base, size, self._processes, self._handles)
        self._release.atexit = False  # at exit the kernel unmaps it, and engines may still be closed

    def group(self, ranks: Sequence[int]) -> SharedMemoryGroup | None:
        """The next process group in the memory; None if this rank is not in `ranks`."""
        return self._take(SharedMemoryGroup, ranks, NUM_SLOTS, SLOT_BYTES)

    def mailbox(self) -> SharedMemoryMailbox:
        """The mailbox, next in the memory, for messages to all ranks."""
        mailbox = self._take(SharedMemoryMailbox, range(len(self._processes)), NUM_MAIL_SLOTS, MAIL_SLOT_BYTES)
        assert mailbox is not None
        return mailbox

    def limit_waits(self, seconds: float) -> None:
        """Set the timeout of all waits (RuntimeError), except for ranks that wait for a message from rank 0."""
        for endpoint in self._endpoints:
            if not (isinstance(endpoint, SharedMemoryMailbox) and self._rank != 0):
                self._library.group_limit(endpoint.handle, int(seconds * NANOSECONDS))

    def yield_early(self) -> None:
        """Sleep soon in all waits: ranks outnumber cores, so the rank that is waited for may need this one's core."""
        for endpoint in self._endpoints:
            self._library.group_patience(endpoint.handle, CROWDED_SPIN_NS, CROWDED_YIELD_NS)

    def close(self) -> None:
        """Leave. Ranks that wait for this one raise RuntimeError."""
        for endpoint in self._endpoints:
            endpoint.handle = None
        self._release()

    def _take(self, kind: type[T], ranks: Sequence[int], num_slots: int, slot_bytes: int) -> T | None:
        place = self._base + self._next
        self._next += self._library.group_bytes(len(ranks), num_slots, slot_bytes)
        if self._rank not in ranks:
            return None
        mine = list(ranks).index(self._rank)
        left = (ctypes.c_void_p * len(ranks))(
            *(self._base + AUTH_TOKEN_BYTES + LINE_BYTES * (rank + 1) for rank in ranks)
        )
        processes = (ctypes.c_int * len(ranks))(*(self._processes[rank] for rank in ranks))
        handle = self._library.group_open(
            place, len(ranks), mine, num_slots, slot_bytes, left, processes, SPIN_NS, YIELD_NS
        )
        self._handles.append(handle)
        self._endpoints.append(kind(self._library, handle, list(ranks), mine))
        return self._endpoints[-1]  # type: ignore[return-value]


def share_memory(rank: int, groups: Sequence[Sequence[int]], control: Any) -> SharedMemory:
    """Share memory for these process groups and a mailbox among all ranks of the gloo group `control`. Collective.

    Raises `SharedMemoryUnavailableError` on every rank if any of them cannot take part.
    """
    file, auth_token = -1, secrets.token_bytes(AUTH_TOKEN_BYTES)
    try:
        library = declare(open_library("collectives"))
        size = _total_bytes(library, torch.distributed.get_world_size(control), groups)
        os.close(os.pidfd_open(os.getpid()))
        if rank == 0:
            file = os.memfd_create("ulysses_infer", os.MFD_CLOEXEC)
            os.truncate(file, size)
            os.pwrite(file, auth_token, 0)
        problem = ""
    except (NativeUnavailableError, OSError, AttributeError) as error:
        problem = f"rank {rank}: {error}"
    mine = MemoryRendezvous(host_identity(), os.getpid(), file, auth_token, problem)
    try:
        rendezvous: list[MemoryRendezvous] = _gather(mine, control)
        _raise_first([each.problem for each in rendezvous])
        if len({each.host for each in rendezvous}) > 1:
            raise SharedMemoryUnavailableError("the ranks are not on one host")
        memory, problem = None, ""
        try:
            memory = _open(library, size, rank, rendezvous)
        except OSError as error:
            problem = f"rank {rank} cannot open the memory of rank 0: {error.strerror}"
        _raise_first(_gather(problem, control))
    finally:
        if file >= 0:
            os.close(file)
    assert memory is not None
    return memory


def _open(library: ctypes.CDLL, size: int, rank: int, rendezvous: Sequence[MemoryRendezvous]) -> SharedMemory:
    first = rendezvous[0]
    with open(f"/proc/{first.process}/fd/{first.file}", "r+b", buffering=0) as file:
        if file.read(AUTH_TOKEN_BYTES) != first.auth_token:
            raise OSError(0, "another process holds that file")
        base = library.memory_map(file.fileno(), size)
    if base is None:
        raise OSError(0, f"mapping {size} bytes failed")
    return SharedMemory(library, base, size, rank, [os.pidfd_open(each.process) for each in rendezvous])


def _release(library: ctypes.CDLL, base: int, size: int, processes: Sequence[int], handles: Sequence[int]) -> None:
    for handle in handles:
        library.group_close(handle)
    library.memory_unmap(base, size)
    for process in processes:
        os.close(process)


def _raise_first(problems: Sequence[str]) -> None:
    for problem in filter(None, problems):
        raise SharedMemoryUnavailableError(problem)


def _gather(value: Any, control: Any) -> list[Any]:
    values: list[Any] = [None] * torch.distributed.get_world_size(control)
    torch.distributed.all_gather_object(values, value, group=control)
    return values


def _head_bytes(num_ranks: int) -> int:
    return round_up(LINE_BYTES * (num_ranks + 2), 4096)


def _total_bytes(library: ctypes.CDLL, num_ranks: int, groups: Sequence[Sequence[int]]) -> int:
    total = _head_bytes(num_ranks) + library.group_bytes(num_ranks, NUM_MAIL_SLOTS, MAIL_SLOT_BYTES)
    return int(total + sum(library.group_bytes(len(ranks), NUM_SLOTS, SLOT_BYTES) for ranks in groups))
