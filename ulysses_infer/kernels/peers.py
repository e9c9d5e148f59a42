"""Memory that every rank of a group can address, and how kernels of different ranks wait for each other.

Each rank has a buffer of two halves, which its peers read, and a table of flags, which they write. Calls use the halves
in turn: a call copies what the peers need into one half, raises a flag at each peer, waits for theirs, and reads their
halves. Flags hold the number of the call, the epoch, and are never reset.

One barrier per call is enough: a rank that starts call n + 2, which overwrites the half of call n, has seen every peer
start call n + 1, and a peer starts that only after it has read all of call n. Calls of one group must therefore be
in one order on all ranks, on one stream. Epochs are counted on the device, so a captured call can be replayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.launch import launch

PROGRAMS = 128
"""The most programs of a call on a GPU. Each signals for itself, so it waits only for the same program of its peers."""
FLAG_BYTES = 8


@dataclass(frozen=True)
class PeerBuffers:
    """The buffers of a group of ranks, seen from one of them. Flags must be zero before the first call."""

    halves: torch.Tensor
    """[ranks] int64: the address of each rank's two halves, of `half_bytes` each, aligned to 16 bytes."""
    flags: torch.Tensor
    """[ranks] int64: the address of each rank's flags, [programs, ranks] int64."""
    epochs: torch.Tensor
    """[programs] int64, of this rank alone: how many calls each program has finished; all are equal between calls."""
    rank: int
    half_bytes: int

    @property
    def programs(self) -> int:
        """The most programs of a call; a power of two, and at least the number of ranks."""
        return len(self.epochs)

    @property
    def constants(self) -> dict[str, int]:
        """Constants of all kernels."""
        ranks = len(self.halves)
        peers: int = triton.next_power_of_2(ranks)
        return {"RANK": self.rank, "RANKS": ranks, "PEERS": peers, "HALF": self.half_bytes, "PROGRAMS": self.programs}


def flag_bytes(ranks: int) -> int:
    """Bytes of the flags of one rank."""
    return PROGRAMS * ranks * FLAG_BYTES


@triton.jit
def next_epoch(epochs):
    """The number of this call, which is the same in all programs."""
    return tl.load(epochs + tl.program_id(0)) + 1


@triton.jit
def finish(epochs, epoch, PROGRAMS: tl.constexpr):
    """Count this call as finished. Programs that it did not need are counted by those that it has."""
    program = tl.arange(0, PROGRAMS)
    tl.store(epochs + program, epoch + tl.zeros([PROGRAMS], tl.int64), program % tl.num_programs(0) == tl.program_id(0))


@triton.jit
def half_of(halves, rank, epoch, dtype: tl.constexpr, HALF: tl.constexpr):
    """The half of `rank` that this call uses."""
    address = tl.load(halves + rank) + (epoch % 2) * HALF
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def flag_of(flags, owner, source, RANKS: tl.constexpr):
    """The flag at rank `owner` that this program of rank `source` raises."""
    place = tl.program_id(0) * RANKS + source
    return (tl.load(flags + owner) + place * 8).to(tl.pointer_type(tl.int64))


@triton.jit
def raised(flag):
    """What the flag holds. All that its rank wrote before it raised the flag is visible after."""
    return tl.atomic_add(flag, tl.zeros(flag.shape, tl.int64), sem="acquire", scope="sys")


@triton.jit
def meet_all(flags, epoch, RANK: tl.constexpr, RANKS: tl.constexpr, PEERS: tl.constexpr):
    """Wait until this program of every rank has written its part of this call.

    A peer may be one call ahead, so its flag may be higher.
    """
    peer = tl.minimum(tl.arange(0, PEERS), RANKS - 1)
    tl.debug_barrier()
    tl.atomic_xchg(flag_of(flags, peer, RANK, RANKS), epoch + tl.zeros([PEERS], tl.int64), sem="release", scope="sys")
    mine = flag_of(flags, RANK + tl.zeros([PEERS], tl.int32), peer, RANKS)
    lowest = tl.min(raised(mine), axis=0)
    while lowest < epoch:
        lowest = tl.min(raised(mine), axis=0)
    tl.debug_barrier()


@triton.jit
def meet_pair(flags, epoch, target, source, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Tell `target` that this program has written its part for it, and wait for that of `source`."""
    one = tl.zeros([1], tl.int32)
    tl.debug_barrier()
    tl.atomic_xchg(
        flag_of(flags, target + one, RANK, RANKS), epoch + tl.zeros([1], tl.int64), sem="release", scope="sys"
    )
    mine = flag_of(flags, RANK + one, source, RANKS)
    lowest = tl.min(raised(mine), axis=0)
    while lowest < epoch:
        lowest = tl.min(raised(mine), axis=0)
    tl.debug_barrier()


@triton.jit
def greet_kernel(halves, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Write this rank's number to place `RANK` of the rank of this program, as flags are written."""
    word = tl.load(halves + tl.program_id(0)).to(tl.pointer_type(tl.int64)) + RANK + tl.arange(0, 1)
    tl.atomic_xchg(word, RANK + tl.zeros([1], tl.int64), sem="release", scope="sys")


@triton.jit
def greetings_kernel(halves, out, RANKS: tl.constexpr):
    """Read the numbers that the rank of this program has got."""
    for place in tl.static_range(RANKS):
        word = tl.load(halves + tl.program_id(0)).to(tl.pointer_type(tl.int64)) + place
        tl.store(out + tl.program_id(0) * RANKS + place, tl.load(word))


def greet(peers: PeerBuffers) -> None:
    """Write this rank's number to the memory of every rank. Never waits."""
    ranks = len(peers.halves)
    launch(greet_kernel, (ranks,), peers.halves, RANK=peers.rank, RANKS=ranks)


def greetings(peers: PeerBuffers) -> torch.Tensor:
    """[ranks, ranks] int64: the numbers that each rank has got, in rank order, once all have called `greet`."""
    ranks = len(peers.halves)
    out = peers.halves.new_empty(ranks, ranks)
    launch(greetings_kernel, (ranks,), peers.halves, out, RANKS=ranks)
    return out
