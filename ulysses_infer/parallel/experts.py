"""Dispatches tokens to the owners of their experts and combines the results.

In mode (sp, tp) the members of an SP group hold different tokens, and between them some of the experts (or a part of
each). Both ways here give a rank the sum over what its own SP group holds, for its own tokens; the sum over the TP
group, which all layers end with, adds what the other SP groups hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from ulysses_infer.parallel.collectives import Collectives
from ulysses_infer.parallel.layout import Span
from ulysses_infer.parallel.torch_group import TorchProcessGroup

Compute = Callable[[torch.Tensor], torch.Tensor]
"""Packed tokens [n, C] to their sums over what this rank holds, [n, H]."""

DISPATCH_BYTES = 1 << 20  # what dispatch must save a rank to be worth one more exchange and a wait; measured over gloo


def gather_and_scatter(
    collectives: Collectives, packed: torch.Tensor, tokens: Sequence[Span], compute: Compute
) -> torch.Tensor:
    """Every member computes on the tokens of all, then the members' results are summed where the tokens live.

    packed: [t, C]; returns [t, H].
    """
    partial = compute(collectives.gather_rows(packed, [span.size for span in tokens]))
    received = collectives.heads_to_tokens(partial, tokens)
    return received.view(len(packed), len(tokens), partial.shape[1]).sum(dim=1)


def dispatch(collectives: Collectives, packed: torch.Tensor, members: torch.Tensor, compute: Compute) -> torch.Tensor:
    """A token goes once to each member that owns an expert it chose, and a sum comes back from each.

    packed: [t, C]; members: [t, K], which member of the SP group owns each choice (others than 0 .. sp - 1: none
    here); returns [t, H].
    """
    sp = collectives.place.mode.sp
    wanted = torch.stack([(members == member).any(dim=1) for member in range(sp)])
    _, rows = wanted.nonzero(as_tuple=True)  # by member, then by token
    sent = wanted.sum(dim=1)
    received = torch.empty_like(sent)
    _exchange(collectives, received, sent, [1] * sp, [1] * sp)
    send_counts, receive_counts = sent.tolist(), received.tolist()
    arrived = packed.new_empty(sum(receive_counts), packed.shape[1])
    _exchange(collectives, arrived, packed[rows], receive_counts, send_counts)
    results = compute(arrived)
    returned = results.new_empty(len(rows), results.shape[1])
    _exchange(collectives, returned, results, send_counts, receive_counts)
    total = results.new_zeros(len(packed), results.shape[1], dtype=torch.float32)
    for token, part in zip(rows.split(send_counts), returned.split(send_counts), strict=True):
        total[token] += part  # a token is once in each: in a fixed order, whatever the device
    return total.to(results.dtype)


def dispatch_pays(collectives: Collectives, num_tokens: int, num_experts: int, choices: int, row_bytes: int) -> bool:
    """Whether dispatching is expected to be faster than gathering. The same on all ranks, as it must be.

    In shared memory gathering is no more than a copy, and there is no exchange whose sizes only two ranks know.
    """
    place = collectives.place
    owners = min(num_experts, place.world_size)
    share = 1 - (1 - 1 / owners) ** choices  # of the tokens that choose any expert of one owner
    away = num_tokens * (place.mode.sp - 1) / place.mode.sp
    return isinstance(collectives.sp_group, TorchProcessGroup) and 2 * away * (1 - share) * row_bytes > DISPATCH_BYTES


def _exchange(
    collectives: Collectives,
    received: torch.Tensor,
    sent: torch.Tensor,
    receive_rows: list[int],
    send_rows: list[int],
) -> None:
    """An all-to-all of any number of rows in the SP group."""
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
