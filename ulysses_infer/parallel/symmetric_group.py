"""A process group whose small messages travel through symmetric memory between the GPUs of one host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ulysses_infer.kernels import collectives
from ulysses_infer.kernels.launch import has_fp8
from ulysses_infer.kernels.scaled_rows import GROUP, GROUPED, NONE, QuantisedRows
from ulysses_infer.parallel.layout import Span, token_spans
from ulysses_infer.parallel.symmetric_memory import SMALL_BYTES, SymmetricMemory
from ulysses_infer.parallel.torch_group import TorchProcessGroup

SUMMED = (torch.bfloat16, torch.float16, torch.float32)
SUMMED_BY_TORCH = (torch.bfloat16, torch.float32)
ALIGNMENT = 16  # of the sizes that torch's operators take without a slower path
WIDEST_NORM = 16384  # values of a row, which one program keeps in registers


def one_shot_bytes(ranks: int) -> int:
    """The largest sum for which every rank reads everything; above it each rank sums a part and the others read that.

    One shot waits once, but reads `ranks` times the message.
    """
    return SMALL_BYTES if ranks <= 4 else SMALL_BYTES // 2


class SymmetricGroup(TorchProcessGroup):
    """A `TorchProcessGroup` with kernels for messages up to `SMALL_BYTES`.

    What a call does depends on shapes and dtypes alone, so all ranks do the same.
    """

    def __init__(self, process_group: Any, memory: SymmetricMemory) -> None:
        super().__init__(process_group)
        self._memory, self._peers = memory, memory.peer_buffers()
        self._ranks = len(memory.addresses)
        self._one_shot_bytes = one_shot_bytes(self._ranks)

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """All-reduce in place; returns `partial`."""
        if not _is_small(partial) or partial.dtype not in SUMMED:
            return super().sum(partial)
        if partial.nbytes <= self._one_shot_bytes or partial.dtype not in SUMMED_BY_TORCH or partial.nbytes % ALIGNMENT:
            collectives.sum_in_place(partial, self._peers)
            return partial
        return self._sum_by_torch(partial)

    def _sum_by_torch(self, partial: torch.Tensor) -> torch.Tensor:
        """Each rank, or the switch for it, sums one part and writes it to all: one result, in whatever order."""
        operators, name = torch.ops.symm_mem, self._memory.group_name
        operator = operators.multimem_all_reduce_ if self._memory.has_multicast else operators.two_shot_all_reduce_
        staging = self._memory.staging(partial)
        staging.copy_(partial)
        operator(staging, "sum", name)
        return partial.copy_(staging)

    def sum_add_norm(
        self, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: int
    ) -> torch.Tensor | QuantisedRows | None:
        """See `ProcessGroup.sum_add_norm`."""
        if not fuses_norm(partial, residual, weight, kind, self._one_shot_bytes):
            return None
        return collectives.sum_add_norm(partial, residual, weight, eps, kind, self._peers)

    def tokens_to_heads(self, sources: Sequence[torch.Tensor], tokens: Sequence[Span]) -> list[torch.Tensor]:
        """sources: each [t, n * h, d]; returns each as [T, h, d], strided views of one all-to-all."""
        widths = [x.shape[1] // self._ranks * x.shape[2] for x in sources]
        if not self._serves(sources[0], [span.size for span in tokens], self._ranks * sum(widths)):
            return super().tokens_to_heads(sources, tokens)
        received = collectives.tokens_to_heads(self._by_rank(sources), tokens[-1].stop, self._peers)
        pieces = received.split(widths, dim=-1)
        return [piece.unflatten(-1, (-1, x.shape[-1])) for piece, x in zip(pieces, sources, strict=True)]

    def heads_to_tokens(self, output: torch.Tensor, tokens: Sequence[Span]) -> torch.Tensor:
        """output: [T, C]; returns [t, n * C]."""
        sizes = [span.size for span in tokens]
        if not self._serves(output, sizes, self._ranks * output.shape[1]):
            return super().heads_to_tokens(output, tokens)
        output = output if output.stride(1) == 1 else output.contiguous()
        return collectives.heads_to_tokens(output, sum(sizes), sizes[self._mine], self._peers).flatten(1)

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """rows: [counts[mine], D]; returns [sum(counts), D]."""
        if not self._serves(rows, counts, self._ranks * rows.shape[1]):
            return super().gather_rows(rows, counts)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        to_each = rows[:, None].expand(-1, self._ranks, -1)
        return collectives.tokens_to_heads(to_each, sum(counts), self._peers)

    def _serves(self, like: torch.Tensor, counts: Sequence[int], row: int) -> bool:
        """Whether our all-to-all takes rows of `row` values of which rank i has `counts[i]`."""
        even = [span.size for span in token_spans(sum(counts), self._ranks)]
        return like.dtype in SUMMED and list(counts) == even and max(even) * row * like.itemsize <= SMALL_BYTES

    def _by_rank(self, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """sources: each [t, n * h, d]; returns [t, n, sum of h * d], dense in the last dimension."""
        parts = [x.unflatten(1, (self._ranks, -1)).flatten(2) for x in sources]  # copied if heads are not dense
        return parts[0] if len(parts) == 1 and parts[0].stride(2) == 1 else torch.cat(parts, dim=2)


def fuses_norm(partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, kind: int, most_bytes: int) -> bool:
    """Whether one kernel sums, adds and normalises. most_bytes: `one_shot_bytes` of the group."""
    width = partial.shape[-1]
    return (
        _is_small(partial)
        and partial.nbytes <= most_bytes
        and partial.dtype in SUMMED
        and partial.dtype == residual.dtype == weight.dtype
        and residual.is_contiguous()
        and width <= WIDEST_NORM
        and (kind == NONE or has_fp8(partial.device))
        and not (kind == GROUPED and width % GROUP)
    )


def _is_small(x: torch.Tensor) -> bool:
    return x.is_contiguous() and x.nbytes <= SMALL_BYTES
