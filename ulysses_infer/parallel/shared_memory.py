"""The shared memory of a replica's ranks on one host.

It is an anonymous file (memfd) that rank 0 holds open until the others have mapped it through /proc: it has no name,
so nothing is left of it when the last process is gone, however that ends.
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
from ulysses_infer.parallel.shared_group import GroupMember, SharedGroup, SharedMailbox, declare

LINE_BYTES = 128  # apart in the cache, also of processors that fetch lines in pairs
WORD_BYTES = 32
SLOT_BYTES, NUM_SLOTS = 1 << 20, 2
MAIL_SLOT_BYTES, NUM_MAIL_SLOTS = 16 << 10, 32
NANOSECONDS = 1_000_000_000
# How long a rank that waits keeps its core before it sleeps: first looking all the time, unless the other was last
# seen on the same core, then only while nobody else wants it. So it does no harm where ranks share cores.
SPIN_NS, YIELD_NS = 20_000, 2_000_000
T = TypeVar("T", bound=GroupMember)


class SharedMemoryUnavailableError(Exception):
    """Why these ranks cannot share memory, in a few words; raised on all of them alike."""


class MemoryRendezvous(NamedTuple):
    """What a rank tells the others before they share memory."""

    host: str
    process: int
    file: int
    """Rank 0's memory, by its number in rank 0's process."""
    word: bytes
    """What stands in that memory."""
    problem: str = ""
    """Why this rank cannot take part."""


class SharedMemory:
    """This rank's view of the memory. It begins with a word, then a flag a rank, then the groups, one after another."""

    def __init__(self, library: ctypes.CDLL, base: int, size: int, rank: int, processes: Sequence[int]) -> None:
        self._library, self._base, self._rank, self._processes = library, base, rank, list(processes)
        self._next = _head_bytes(len(processes))
        self._members: list[GroupMember] = []
        self._handles: list[int] = []
        self._release = weakref.finalize(self, _release, library, base, size, self._processes, self._handles)
        self._release.atexit = False  # the end of the process says it all, and others may still close engines

    def group(self, ranks: Sequence[int]) -> SharedGroup | None:
        """The next group of the memory, which has these members; None for a rank that is not among them."""
        return self._take(SharedGroup, ranks, NUM_SLOTS, SLOT_BYTES)

    def mailbox(self) -> SharedMailbox:
        """The next of the memory, for messages to all ranks."""
        mailbox = self._take(SharedMailbox, range(len(self._processes)), NUM_MAIL_SLOTS, MAIL_SLOT_BYTES)
        assert mailbox is not None
        return mailbox

    def limit_waits(self, seconds: float) -> None:
        """From now on no wait takes longer: a RuntimeError. Only other ranks than 0 wait for messages for ever."""
        for member in self._members:
            if not (isinstance(member, SharedMailbox) and self._rank != 0):
                self._library.group_limit(member.handle, int(seconds * NANOSECONDS))

    def close(self) -> None:
        """Leave. Ranks that wait for this one get a RuntimeError."""
        for member in self._members:
            member.handle = None
        self._release()

    def _take(self, kind: type[T], ranks: Sequence[int], num_slots: int, slot_bytes: int) -> T | None:
        place = self._base + self._next
        self._next += self._library.group_bytes(len(ranks), num_slots, slot_bytes)
        if self._rank not in ranks:
            return None
        mine = list(ranks).index(self._rank)
        left = (ctypes.c_void_p * len(ranks))(*(self._base + WORD_BYTES + LINE_BYTES * (rank + 1) for rank in ranks))
        processes = (ctypes.c_int * len(ranks))(*(self._processes[rank] for rank in ranks))
        handle = self._library.group_open(
            place, len(ranks), mine, num_slots, slot_bytes, left, processes, SPIN_NS, YIELD_NS
        )
        self._handles.append(handle)
        self._members.append(kind(self._library, handle, list(ranks), mine))
        return self._members[-1]  # type: ignore[return-value]


def share_memory(rank: int, groups: Sequence[Sequence[int]], control: Any) -> SharedMemory:
    """Memory for these groups and a mailbox, shared by all ranks of the gloo group `control`. Collective.

    Raises `SharedMemoryUnavailableError` on every rank if any of them cannot take part.
    """
    file, word = -1, secrets.token_bytes(WORD_BYTES)
    try:
        library = declare(open_library("collectives"))
        size = _total_bytes(library, torch.distributed.get_world_size(control), groups)
        os.close(os.pidfd_open(os.getpid()))
        if rank == 0:
            file = os.memfd_create("ulysses_infer", os.MFD_CLOEXEC)
            os.truncate(file, size)
            os.pwrite(file, word, 0)
        offer = MemoryRendezvous(host_identity(), os.getpid(), file, word)
    except (NativeUnavailableError, OSError, AttributeError) as error:
        offer = MemoryRendezvous(host_identity(), os.getpid(), file, word, f"rank {rank}: {error}")
    try:
        offers: list[MemoryRendezvous] = _gather(offer, control)
        _raise_first([other.problem for other in offers])
        if len({other.host for other in offers}) > 1:
            raise SharedMemoryUnavailableError("the ranks are not on one host")
        memory, problem = None, ""
        try:
            memory = _open(library, size, rank, offers)
        except OSError as error:
            problem = f"rank {rank} cannot open the memory of rank 0: {error.strerror}"
        _raise_first(_gather(problem, control))
    finally:
        if file >= 0:
            os.close(file)
    assert memory is not None
    return memory


def _open(library: ctypes.CDLL, size: int, rank: int, offers: Sequence[MemoryRendezvous]) -> SharedMemory:
    first = offers[0]
    with open(f"/proc/{first.process}/fd/{first.file}", "r+b", buffering=0) as file:
        if file.read(WORD_BYTES) != first.word:
            raise OSError(0, "it is another one's")
        base = library.memory_map(file.fileno(), size)
    if base is None:
        raise OSError(0, f"{size} bytes of address space are not to be had")
    return SharedMemory(library, base, size, rank, [os.pidfd_open(offer.process) for offer in offers])


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
