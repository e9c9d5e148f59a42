"""Collectives over memory that every rank of a group can address (`peers.py`): sums, sums with a norm, all-to-alls."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.launch import launch
from ulysses_infer.kernels.norm import empty_normed, norm_warps, row_columns, write_normed
from ulysses_infer.kernels.peers import PeerBuffers, finish, half_of, meet_all, meet_pair, next_epoch
from ulysses_infer.kernels.quantisation import tile_groups
from ulysses_infer.kernels.scaled_rows import QuantisedRows

TILE = 1024


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
