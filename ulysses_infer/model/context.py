"""The step context: the only per-step state that layers may read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ulysses_infer.attention.backend import AttentionBackend, AttentionMetadata
    from ulysses_infer.cache.paged import PagedCache
    from ulysses_infer.native.matmul import NativeMatmul
    from ulysses_infer.parallel.collectives import Collectives
    from ulysses_infer.parallel.layout import Span


@dataclass(frozen=True)
class StepContext:
    """What one forward step is: its mode's collectives, its token slices, its sequences, its cache."""

    collectives: Collectives
    token_spans: list[Span]  # one a member of the SP group, in batch order
    logits_counts: list[int]  # rows that need logits, one count a member of the SP group
    attention: AttentionMetadata  # of the first cache group, often the only one
    cache: PagedCache
    backend: AttentionBackend
    matmul: NativeMatmul | None = None  # torch's, if None
    adapters: Sequence[tuple[int, torch.Tensor]] = ()  # (number, rows of this rank's slice that go through it)
    attention_of_layers: Sequence[AttentionMetadata] | None = None  # where there are several cache groups

    def attention_of(self, layer: int) -> AttentionMetadata:
        """The step's sequences as `layer` reads them."""
        return self.attention if self.attention_of_layers is None else self.attention_of_layers[layer]

    @property
    def num_local_tokens(self) -> int:
        """Tokens of the batch in this rank's slice; 0 when there are fewer tokens than slices."""
        return self.token_spans[self.collectives.place.token_index].size


_current: ContextVar[StepContext] = ContextVar("ulysses_infer_step")


def step_context() -> StepContext:
    """The context of the step being run. Raises LookupError outside a step."""
    return _current.get()


def step_context_or_none() -> StepContext | None:
    """The context of the step being run, None outside a step."""
    return _current.get(None)


@contextmanager
def use_step_context(context: StepContext) -> Iterator[None]:
    """Make `context` the current step for the duration of a forward pass."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
