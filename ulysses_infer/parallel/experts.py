"""Dispatches tokens to the owners of their experts and combines the results.

In mode (sp, tp) the ranks of an SP group hold different tokens, and together some of the experts (or a part of each).
Both ways give a rank, for its own tokens, the sum over the experts of its SP group. The all-reduce over the TP
group, with which all layers end, adds the experts of the other SP groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from ulysses_infer.parallel.collectives import Collectives
from ulysses_infer.parallel.layout import Span
from ulysses_infer.parallel.torch_group import TorchProcessGroup

Compute = Callable[[torch.Tensor], torch.Tensor]
"""Maps packed tokens [n, C] to their sums over the experts of this rank, [n, H]."""

DISPATCH_BYTES = 1 << 20  # traffic per rank that dispatch must save to pay for one more all-to-all; measured over gloo


def gather_tokens(collectives: Collectives, packed: torch.Tensor, tokens: Sequence[Span]) -> torch.Tensor:
    """All-gather tokens, so that every rank of the SP group computes on all of them. packed: [t, C]; returns [T, C]."""
    return collectives.gather_rows(packed, [span.size for span in tokens])


def return_parts(collectives: Collectives, partial: torch.Tensor, tokens: Sequence[Span]) -> torch.Tensor:
    """Send partial [T, H], sums over a rank's experts, to the rank of each token; returns the terms, [t, sp, H]."""
    received = collectives.heads_to_tokens(partial, tokens)
    return received.view(-1, len(tokens), partial.shape[1])


def dispatch(collectives: Collectives, packed: torch.Tensor, owners: torch.Tensor, compute: Compute) -> torch.Tensor:
    """Send each token once to each rank that owns an expert it chose, and receive one sum from each.

    packed: [t, C]; owners: [t, K], the index in the SP group of the rank that owns each chosen expert (outside
    0 .. sp - 1: not in this SP group); returns [t, H].
    """
    sp = collectives.place.mode.sp
    wanted = torch.stack([(owners == index).any(dim=1) for index in range(sp)])
    _, rows = wanted.nonzero(as_tuple=True)  # by rank, then by token
    sent = wanted.sum(dim=1)
    received = torch.empty_like(sent)
    _exchange(collectives, received, sent, [1] * sp, [1] * sp)
    send_counts, receive_counts = sent.tolist(), received.tolist()
    received_rows = packed.new_empty(sum(receive_counts), packed.shape[1])
    _exchange(collectives, received_rows, packed[rows], receive_counts, send_counts)
    results = compute(received_rows)
    returned = results.new_empty(len(rows), results.shape[1])
    _exchange(collectives, returned, results, send_counts, receive_counts)
    total = results.new_zeros(len(packed), results.shape[1], dtype=torch.float32)
    for token, part in zip(rows.split(send_counts), returned.split(send_counts), strict=True):
        total[token] += part  # a token occurs once in each part, so the order of the sum is fixed on every device
    return total.to(results.dtype)


def dispatch_pays(collectives: Collectives, num_tokens: int, num_experts: int, choices: int, row_bytes: int) -> bool:
    """Whether `dispatch` is expected to be faster than `gather_tokens` and `return_parts`. The same on all ranks.

    In shared memory gathering is only a copy, and there is no all-to-all whose sizes only two ranks know.
    """
    place = collectives.place
    owners = min(num_experts, place.world_size)
    share = 1 - (1 - 1 / owners) ** choices  # of tokens that choose any expert of one rank
    away = num_tokens * (place.mode.sp - 1) / place.mode.sp
    return isinstance(collectives.sp_group, TorchProcessGroup) and 2 * away * (1 - share) * row_bytes > DISPATCH_BYTES


def _exchange(
    collectives: Collectives,
    received: torch.Tensor,
    sent: torch.Tensor,
    receive_rows: list[int],
    send_rows: list[int],
) -> None:
    """All-to-all of uneven rows in the SP group."""
    assert isinstance(collectives.sp_group, TorchProcessGroup)
    started = time.perf_counter()
    import deepspeed.comm as comm

    comm.all_to_all_single(
        received,
        sent.contiguous(),
        output_split_sizes=receive_rows,
        input_split_sizes=send_rows,
        group=collectives.sp_group.process_group,
    )
    collectives.clock.add("all_to_all", started)
