"""The tokens before each token of a sequence, whether they are of this step or earlier, on this rank or another."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ulysses_infer.cache.states import CONVOLUTION, StateSequences, StateShape
from ulysses_infer.model.context import StepContext, step_context
from ulysses_infer.parallel.layout import Span


class KeepsStates(ABC):
    """A module with states of its own, beside those of recurrent layers."""

    @abstractmethod
    def own_states(self) -> tuple[StateShape, ...]:
        """The states that this rank keeps of each sequence, the same in every mode."""
        ...


def kept_states(model: nn.Module) -> tuple[StateShape, ...]:
    """The states of all modules of `model` that keep some."""
    return tuple(
        shape for module in model.modules() if isinstance(module, KeepsStates) for shape in module.own_states()
    )


@dataclass(frozen=True)
class History:
    """The last `count` vectors of every sequence, which a causal convolution reads.

    is_sliced: the vectors are those of the residual stream, of which a rank has the tokens of its slice. Then ranks
    exchange the ends of their slices, and every rank keeps the state of every sequence, as it has all channels of the
    residual stream in every mode. Otherwise a rank has those of all tokens, and keeps what belongs to its own heads.
    """

    layer: int
    index: int
    """Number of the state in its layer."""
    count: int
    is_sliced: bool = False

    def shape(self, width: int, dtype: torch.dtype) -> StateShape:
        """The state of vectors with `width` elements."""
        return StateShape(self.layer, CONVOLUTION, self.index, (self.count, width), dtype)

    def before(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields the vectors one token back, then two, up to `count`, each [t, C]; zero before the first token.

        tokens: [t, C], of the slice or of all. The states are those after the step when the first is yielded.
        """
        context = step_context()
        sequences, states = context.sequences, context.states
        assert sequences is not None
        assert states is not None
        old = states.get(self.layer, CONVOLUTION, self.index, sequences.slots)
        decodes = all(length == 1 for length in sequences.query_lens)
        yield from (self._decoded if decodes else self._looked_up)(context, tokens, old)

    def _decoded(self, context: StepContext, tokens: torch.Tensor, old: torch.Tensor) -> Iterator[torch.Tensor]:
        """One token of each sequence. Makes no tensor on the host, so that it can be captured."""
        whole, own = tokens, slice(None)
        if self._is_exchanged(context):
            whole = context.collectives.gather_rows(tokens, [span.size for span in context.token_spans])
            own = slice(*context.token_spans[context.collectives.place.token_index])
        self._store(context, torch.cat((old[:, 1:], whole[:, None]), dim=1))
        for lag in range(1, self.count + 1):
            yield old[own, self.count - lag]

    def _looked_up(self, context: StepContext, tokens: torch.Tensor, old: torch.Tensor) -> Iterator[torch.Tensor]:
        """Any numbers of tokens: each vector is one of this rank, of another rank's end, or of the state."""
        assert context.sequences is not None
        spans: Sequence[Span] = (Span(0, sum(context.sequences.query_lens)),)
        own = 0
        if self._is_exchanged(context):
            spans, own = context.token_spans, context.collectives.place.token_index
        places = places_of(context.sequences, tuple(spans), own, self.count, tokens.device)
        pool = [tokens, old.flatten(0, 1)]
        if len(spans) > 1:
            ends = tokens.index_select(0, places.own_ends)
            pool.insert(1, context.collectives.gather_rows(ends, places.num_ends))
        known = torch.cat(pool)
        self._store(context, known.index_select(0, places.last).view(old.shape))
        for lag in range(self.count):
            yield known.index_select(0, places.before[lag])

    def _is_exchanged(self, context: StepContext) -> bool:
        return self.is_sliced and context.collectives.place.mode.sp > 1

    def _store(self, context: StepContext, last: torch.Tensor) -> None:
        assert context.sequences is not None
        assert context.states is not None
        context.states.put(self.layer, CONVOLUTION, self.index, context.sequences.slots, last)


class Places(NamedTuple):
    """Where vectors are among those of a rank's tokens, the exchanged ends of slices, and the states, joined."""

    own_ends: torch.Tensor
    """Of this rank's tokens, those that others need."""
    num_ends: list[int]
    """How many each rank sends."""
    before: torch.Tensor
    """[count, t]: the vector so many tokens before each of this rank's tokens."""
    last: torch.Tensor
    """[N * count]: the last vectors of each sequence after the step."""


@functools.lru_cache(maxsize=8)  # of the current step, for all layers
def places_of(sequences: StateSequences, spans: tuple[Span, ...], own: int, count: int, device: torch.device) -> Places:
    """The places of what rank `own` of those with `spans` needs of the `count` tokens before each of its own.

    A single span is that of all tokens: nothing is exchanged.
    """
    lengths = np.array(sequences.query_lens, dtype=np.int64)
    stops = np.cumsum(lengths)
    ends = _rows_at_ends(stops - lengths, stops, spans, count) if len(spans) > 1 else np.empty(0, dtype=np.int64)
    span, place = spans[own], np.full(int(stops[-1]), -1, dtype=np.int64)
    place[ends] = span.size + np.arange(len(ends))
    place[span.start : span.stop] = np.arange(span.size)
    states = span.size + len(ends)

    def found(rows: np.ndarray, members: np.ndarray) -> np.ndarray:
        """The places of step rows that belong to the sequences `members`; rows before the sequence are in its state."""
        missing = (stops - lengths)[members] - rows
        return np.where(missing > 0, states + members * count + count - missing, place[np.maximum(rows, 0)])

    member = np.repeat(np.arange(len(lengths)), lengths)[span.start : span.stop]
    back = np.arange(1, count + 1)[:, None]
    before = found(np.arange(span.start, span.stop) - back, np.broadcast_to(member, (count, span.size)))
    each = np.repeat(np.arange(len(lengths)), count)
    last = found(stops[each] - count + np.tile(np.arange(count), len(lengths)), each)
    mine = ends[(ends >= span.start) & (ends < span.stop)] - span.start
    counts = [int(((ends >= each.start) & (ends < each.stop)).sum()) for each in spans]
    return Places(_on(mine, device), counts, _on(before, device), _on(last, device))


def _rows_at_ends(starts: np.ndarray, stops: np.ndarray, spans: tuple[Span, ...], count: int) -> np.ndarray:
    """The last `count` rows of every slice and of every sequence, ascending."""
    ends = [*zip(starts, stops, strict=True), *spans]
    rows = [np.arange(max(start, stop - count), stop) for start, stop in ends]
    return np.unique(np.concatenate(rows)).astype(np.int64)


def _on(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(device)
