"""Runs: the sequences of a step that the inner part of a recurrent layer takes together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ulysses_infer.cache.states import StateSequences


@dataclass(frozen=True)
class Run:
    """Sequences with equally many tokens in a step."""

    rows: torch.Tensor | slice
    """Their rows among the step's tokens: [n * length] int64, or a range."""
    slots: torch.Tensor
    """[n] int64: their state slots."""
    length: int
    """Tokens of each."""

    def pick(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [T, features]; returns those of the run, [n * length, features]."""
        return tokens[self.rows] if isinstance(self.rows, slice) else tokens.index_select(0, self.rows)

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """`pick` by sequence: [n, length, features]."""
        return self.pick(tokens).unflatten(0, (-1, self.length))

    def put(self, tokens: torch.Tensor, own: torch.Tensor) -> None:
        """Write the run's rows, own: [n * length, features], to `tokens` [T, features]."""
        if isinstance(self.rows, slice):
            tokens[self.rows] = own
        else:
            tokens.index_copy_(0, self.rows, own)


@functools.lru_cache(maxsize=2)  # of the current step, for all layers
def runs_of(sequences: StateSequences) -> list[Run]:
    """The step's sequences by number of tokens, in order of first appearance."""
    lengths = list(sequences.query_lens)
    distinct = list(dict.fromkeys(lengths))
    if len(distinct) == 1:
        return [Run(slice(None), sequences.slots, lengths[0])]
    return [_run(sequences.slots, lengths, length) for length in distinct if length]


def _run(slots: torch.Tensor, lengths: Sequence[int], length: int) -> Run:
    members = [number for number, each in enumerate(lengths) if each == length]
    starts = [0, *accumulate(lengths)]
    if members == list(range(members[0], members[-1] + 1)):
        return Run(slice(starts[members[0]], starts[members[-1] + 1]), slots[members[0] : members[-1] + 1], length)
    rows = [row for number in members for row in range(starts[number], starts[number] + length)]
    own = slots.index_select(0, torch.tensor(members, device=slots.device))
    return Run(torch.tensor(rows, device=slots.device), own, length)
