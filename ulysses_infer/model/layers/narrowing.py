"""Narrowed steps: layers that only the tokens whose logits are needed run through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ulysses_infer.model.context import StepContext, step_context, use_step_context


class NarrowedStep(NamedTuple):
    """What the remaining layers run on, in the slice of this rank."""

    hidden: torch.Tensor  # [1, n, D]
    positions: torch.Tensor  # [1, n] int64
    rows: torch.Tensor | slice  # of `hidden`, that the head takes
    has_tokens: bool  # whether any rank has one


@contextmanager
def narrowed(hidden: torch.Tensor, positions: torch.Tensor, logits_rows: torch.Tensor) -> Iterator[NarrowedStep]:
    """Within the block, the step has only the tokens whose logits are needed, divided evenly over the token slices.

    hidden: [1, t, D]; positions: [1, t] int64; logits_rows: [n]; all of this rank's slice of the whole step. Without a
    narrowed step in the context, all tokens stay. Collective over the SP group.
    """
    context = step_context()
    if context.narrowed is None:
        yield NarrowedStep(hidden, positions, logits_rows, True)
        return
    own = context.narrowed
    rows = _own_rows(hidden[0].index_select(0, logits_rows), context, own)
    assert own.positions is not None
    with use_step_context(own):
        yield NarrowedStep(rows[None], own.positions[None], slice(own.num_local_tokens), own.num_tokens > 0)


def _own_rows(rows: torch.Tensor, context: StepContext, own: StepContext) -> torch.Tensor:
    """rows: [n, D], of this rank's slice of the whole step; returns those of its slice of the narrowed one, [n', D].

    A rank without any has a dummy row.
    """
    gathered = context.collectives.gather_rows(rows, context.logits_counts)
    span = own.token_spans[own.collectives.place.token_index]
    return gathered[span.start : span.stop] if span.size else rows.new_zeros(1, rows.shape[1])
