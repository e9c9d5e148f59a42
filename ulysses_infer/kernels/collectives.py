"""Collectives over memory that every rank of a group can address: sums, sums with a norm, and all-to-alls.

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
from ulysses_infer.kernels.norm import empty_normed, norm_warps, row_columns, write_normed
from ulysses_infer.kernels.quantisation import tile_groups
from ulysses_infer.kernels.scaled_rows import QuantisedRows

PROGRAMS = 128
"""The most programs of a call on a GPU. Each signals for itself, so it waits only for the same program of its peers."""
TILE = 1024
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
def summed(halves, epoch, place, inside, dtype: tl.constexpr, RANKS: tl.constexpr, HALF: tl.constexpr):
    """The sum over the ranks at `place` in their halves: in rank order, in float32, rounded once."""
    total = tl.load(half_of(halves, 0, epoch, dtype, HALF) + place, mask=inside, other=0.0).to(tl.float32)
    for rank in tl.static_range(1, RANKS):
        part = half_of(halves, rank, epoch, dtype, HALF)
        total += tl.load(part + place, mask=inside, other=0.0).to(tl.float32)
    return total.to(dtype)


@triton.jit
def sum_kernel(
    partial,
    halves,
    flags,
    epochs,
    size,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PEERS: tl.constexpr,
    HALF: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """All-reduce of `partial` [size] in place. Every program sums some tiles."""
    epoch = next_epoch(epochs)
    dtype: tl.constexpr = partial.dtype.element_ty
    own = half_of(halves, RANK, epoch, dtype, HALF)
    first = tl.program_id(0) * TILE
    step = tl.num_programs(0) * TILE
    for start in range(first, size, step):
        place = start + tl.arange(0, TILE)
        tl.store(own + place, tl.load(partial + place, mask=place < size), mask=place < size)
    meet_all(flags, epoch, RANK, RANKS, PEERS)
    for start in range(first, size, step):
        place = start + tl.arange(0, TILE)
        inside = place < size
        tl.store(partial + place, summed(halves, epoch, place, inside, dtype, RANKS, HALF), mask=inside)
    finish(epochs, epoch, PROGRAMS)


@triton.jit
def sum_add_norm_kernel(
    partial,
    residual,
    weight,
    out,
    values,
    scales,
    halves,
    flags,
    epochs,
    rows,
    scale_stride,
    width,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PEERS: tl.constexpr,
    HALF: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GROUPS: tl.constexpr,
    KIND: tl.constexpr,
):
    """All-reduce of `partial` [rows, width], added to `residual`, and the norm of that. Every program takes some rows.

    Rounds as `sum_kernel` followed by `rms_norm_kernel`.
    """
    epoch = next_epoch(epochs)
    dtype: tl.constexpr = partial.dtype.element_ty
    column = row_columns(GROUPS)
    inside = column < width
    own = half_of(halves, RANK, epoch, dtype, HALF)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        tl.store(own + row * width + column, tl.load(partial + row * width + column, mask=inside), mask=inside)
    meet_all(flags, epoch, RANK, RANKS, PEERS)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        place = row * width + column
        part = summed(halves, epoch, place, inside, dtype, RANKS, HALF).to(tl.float32)
        before = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        total = (before + part).to(dtype)
        tl.store(residual + place, total, mask=inside)
        write_normed(total.to(tl.float32), weight, out, values, scales, row, scale_stride, width, eps, GROUPS, KIND)
    finish(epochs, epoch, PROGRAMS)


@triton.jit
def span_start(index, total, RANKS: tl.constexpr):
    """The first token of slice `index`, as `even_span` divides them."""
    return (index * total) // RANKS


@triton.jit
def copy_row(source, target, width, TILE: tl.constexpr):
    """Copy `width` values."""
    for start in range(0, width, TILE):
        column = start + tl.arange(0, TILE)
        tl.store(target + column, tl.load(source + column, mask=column < width), mask=column < width)


@triton.jit
def exchange_kernel(
    source,
    out,
    halves,
    flags,
    epochs,
    tokens,
    source_row,
    source_rank,
    out_row,
    out_rank,
    width,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PEERS: tl.constexpr,
    HALF: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TO_HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    """All-to-all of rows of `width` values between the slices of `tokens` tokens and the ranks.

    TO_HEADS: from `source` [own tokens, ranks, width] to `out` [all tokens, width]; otherwise from [all tokens, width]
    to [own tokens, ranks, width]. Every program sends to one rank and receives from another, some rows each.
    """
    epoch = next_epoch(epochs)
    dtype: tl.constexpr = source.dtype.element_ty
    distance = tl.program_id(0) % RANKS
    slot = tl.program_id(0) // RANKS
    slots = tl.num_programs(0) // RANKS
    to = (RANK + distance) % RANKS
    sender = (RANK + RANKS - distance) % RANKS
    mine = span_start(RANK, tokens, RANKS)
    mine_size = span_start(RANK + 1, tokens, RANKS) - mine
    to_start = span_start(to, tokens, RANKS)
    sender_start = span_start(sender, tokens, RANKS)
    if TO_HEADS:
        send_rows = mine_size
        read = source + to * source_rank
        send_place = to * mine_size
        receive_rows = span_start(sender + 1, tokens, RANKS) - sender_start
        receive_place = RANK * receive_rows
        write = out + sender_start * out_row
    else:
        send_rows = span_start(to + 1, tokens, RANKS) - to_start
        read = source + to_start * source_row
        send_place = to_start
        receive_rows = mine_size
        receive_place = mine
        write = out + sender * out_rank
    own = half_of(halves, RANK, epoch, dtype, HALF)
    for row in range(slot, send_rows, slots):
        copy_row(read + row * source_row, own + (send_place + row) * width, width, TILE)
    meet_pair(flags, epoch, to, sender, RANK, RANKS)
    peer = half_of(halves, sender, epoch, dtype, HALF)
    for row in range(slot, receive_rows, slots):
        copy_row(peer + (receive_place + row) * width, write + row * out_row, width, TILE)
    finish(epochs, epoch, PROGRAMS)


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


def sum_in_place(partial: torch.Tensor, peers: PeerBuffers) -> None:
    """All-reduce of a dense tensor of at most `half_bytes`, in rank order and float32, rounded once."""
    size = partial.numel()
    launch(
        sum_kernel,
        (min(triton.cdiv(size, TILE), peers.programs),),
        partial,
        peers.halves,
        peers.flags,
        peers.epochs,
        size,
        **peers.constants,
        TILE=TILE,
    )


def sum_add_norm(
    partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: int, peers: PeerBuffers
) -> torch.Tensor | QuantisedRows:
    """All-reduce `partial` [..., D], add it to `residual` in place, and return the norm of that, quantised by `kind`.

    Both are dense, and of at most `half_bytes`. `partial` is left as it is.
    """
    width = partial.shape[-1]
    rows = partial.numel() // width
    groups = tile_groups(width)
    output, (out, values, scales, scale_stride) = empty_normed(partial, kind)
    launch(
        sum_add_norm_kernel,
        (min(rows, peers.programs),),
        partial,
        residual,
        weight,
        out,
        values,
        scales,
        peers.halves,
        peers.flags,
        peers.epochs,
        rows,
        scale_stride,
        width,
        eps,
        **peers.constants,
        GROUPS=groups,
        KIND=kind,
        num_warps=norm_warps(groups),
    )
    return output


def tokens_to_heads(source: torch.Tensor, tokens: int, peers: PeerBuffers) -> torch.Tensor:
    """source: [t, ranks, C], this rank's slice of `tokens` (`token_spans`) with a part for each rank, of dense values.

    Returns [T, C], this rank's part of all tokens.
    """
    out = source.new_empty(tokens, source.shape[2])
    _exchange(source, source.stride(0), source.stride(1), out, (out.stride(0), 0), tokens, peers, to_heads=True)
    return out


def heads_to_tokens(source: torch.Tensor, tokens: int, mine: int, peers: PeerBuffers) -> torch.Tensor:
    """source: [T, C], dense values. Returns [mine, ranks, C]: each rank's values of this rank's `mine` tokens."""
    out = source.new_empty(mine, len(peers.halves), source.shape[1])
    _exchange(source, source.stride(0), 0, out, (out.stride(0), out.stride(1)), tokens, peers, to_heads=False)
    return out


def _exchange(
    source: torch.Tensor,
    source_row: int,
    source_rank: int,
    out: torch.Tensor,
    out_strides: tuple[int, int],
    tokens: int,
    peers: PeerBuffers,
    to_heads: bool,
) -> None:
    ranks = len(peers.halves)
    slots = min(triton.cdiv(tokens, ranks), peers.programs // ranks)
    launch(
        exchange_kernel,
        (slots * ranks,),
        source,
        out,
        peers.halves,
        peers.flags,
        peers.epochs,
        tokens,
        source_row,
        source_rank,
        *out_strides,
        source.shape[-1],
        **peers.constants,
        TO_HEADS=to_heads,
        TILE=TILE,
    )
