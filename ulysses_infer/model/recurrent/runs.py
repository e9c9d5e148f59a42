"""Runs: the sequences of a step that the inner part of a recurrent layer takes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ulysses_infer.cache.states import StateSequences


@dataclass(frozen=True)
class Run:
    """Sequences with equally many tokens in a step."""

    rows: torch.Tensor | None
    """[n * length] int64: their rows among the step's tokens; None: all rows, in order."""
    slots: torch.Tensor
    """[n] int64: their state slots."""
    length: int
    """Tokens of each."""

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [T, features]; returns those of the run, [n, length, features]."""
        own = tokens if self.rows is None else tokens.index_select(0, self.rows)
        return own.unflatten(0, (-1, self.length))

    def put(self, tokens: torch.Tensor, own: torch.Tensor) -> None:
        """Write the run's rows, own: [n * length, features], to `tokens` [T, features]."""
        if self.rows is None:
            tokens.copy_(own)
        else:
            tokens.index_copy_(0, self.rows, own)


def runs_of(sequences: StateSequences) -> list[Run]:
    """The step's sequences by number of tokens, in order of first appearance."""
    lengths = list(sequences.query_lens)
    distinct = list(dict.fromkeys(lengths))
    if len(distinct) == 1:
        return [Run(None, sequences.slots, lengths[0])]
    return [_run(sequences.slots, lengths, length) for length in distinct if length]


def _run(slots: torch.Tensor, lengths: Sequence[int], length: int) -> Run:
    members = [number for number, each in enumerate(lengths) if each == length]
    starts = [0, *accumulate(lengths)]
    rows = [row for number in members for row in range(starts[number], starts[number] + length)]
    own = slots.index_select(0, torch.tensor(members, device=slots.device))
    return Run(torch.tensor(rows, device=slots.device), own, length)
