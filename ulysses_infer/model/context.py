"""The step context: the only per-step state that layers may read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from ulysses_infer.attention.backend import AttentionBackend, AttentionMetadata
from ulysses_infer.cache.paged import PagedCache
from ulysses_infer.cache.states import StateCache, StateSequences
from ulysses_infer.native.matmul import NativeMatmul
from ulysses_infer.parallel.collectives import Collectives
from ulysses_infer.parallel.layout import Span


@dataclass(frozen=True)
class StepContext:
    """The inputs shared by all layers in one forward step: collectives, token slices, sequences, cache and kernels."""

    collectives: Collectives
    token_spans: list[Span]  # one per rank of the SP group, in batch order
    logits_counts: list[int]  # rows that need logits, per rank of the SP group
    attention: AttentionMetadata  # of the first cache group
    cache: PagedCache
    backend: AttentionBackend
    matmul: NativeMatmul | None = None  # None: use torch
    adapters: Sequence[tuple[int, torch.Tensor]] = ()  # (adapter number, rows of this rank's slice that use it)
    attention_of_layers: Sequence[AttentionMetadata] | None = None  # only with several cache groups
    attention_of_groups: Sequence[AttentionMetadata] = ()  # those of every cache group
    is_captured: bool = False  # replayed with other data: no sizes that depend on data
    positions: torch.Tensor | None = None  # [t] int64, of this rank's tokens; `ShiftModel` sets it
    logits_rows: torch.Tensor | None = None  # [n] int64, those of this rank's tokens that need logits; the same
    states: StateCache | None = None  # only with recurrent layers
    sequences: StateSequences | None = None  # the same
    head_inputs: list[torch.Tensor] | None = None  # where the head leaves what it reads; None: nowhere
    narrowed: StepContext | None = None  # of the tokens that need logits, if later layers run on fewer than all

    def attention_of(self, layer: int) -> AttentionMetadata:
        """The attention metadata of the cache group of `layer`."""
        return self.attention if self.attention_of_layers is None else self.attention_of_layers[layer]

    def attention_of_entries(self, layer: int, name: str) -> AttentionMetadata:
        """The attention metadata of the cache group that holds a kind of entries."""
        groups = self.attention_of_groups
        return groups[self.cache.group_of_entries(layer, name)] if len(groups) > 1 else self.attention

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch."""
        return self.token_spans[-1].stop

    @property
    def num_local_tokens(self) -> int:
        """Tokens of the batch in this rank's slice; 0 when there are fewer tokens than slices."""
        return self.token_spans[self.collectives.place.token_index].size


_current: ContextVar[StepContext] = ContextVar("ulysses_infer_step")


def step_context() -> StepContext:
    """The context of the current step. Raises LookupError outside a step."""
    return _current.get()


def step_positions() -> torch.Tensor:
    """The positions of this rank's tokens in the current step, [t] int64."""
    positions = step_context().positions
    assert positions is not None
    return positions


def step_context_or_none() -> StepContext | None:
    """The context of the current step, or None outside a step."""
    return _current.get(None)


@contextmanager
def use_step_context(context: StepContext) -> Iterator[None]:
    """Make `context` the current step context within the `with` block."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
