"""Builds the step context of a forward pass, for every way of running it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ulysses_infer.attention.backend import AttentionBackend, AttentionMetadata
from ulysses_infer.cache.paged import PagedCache
from ulysses_infer.cache.states import StateCache, StateSequences
from ulysses_infer.model.context import StepContext
from ulysses_infer.native.matmul import NativeMatmul
from ulysses_infer.parallel.groups import ProcessGroups
from ulysses_infer.parallel.layout import Mode, Span, even_span, token_spans


class StepContextBuilder:
    """Combines what a rank keeps for all steps with what one step brings."""

    def __init__(
        self,
        cache: PagedCache,
        groups: ProcessGroups,
        backend: AttentionBackend,
        matmul: NativeMatmul | None = None,
        states: StateCache | None = None,
    ) -> None:
        """matmul: None multiplies with torch. states: None for models without recurrent layers."""
        self.cache, self.groups, self.backend, self.matmul, self.states = cache, groups, backend, matmul, states

    def local_span(self, mode: Mode, num_tokens: int) -> Span:
        """This rank's slice of the step's tokens."""
        return even_span(num_tokens, self.groups.place(mode).token_index, mode.sp)

    def build(
        self,
        mode: Mode,
        num_tokens: int,
        attention: Sequence[AttentionMetadata],
        logits_rows: np.ndarray | None = None,
        adapters: Sequence[tuple[int, torch.Tensor]] = (),
        is_captured: bool = False,
        slots: torch.Tensor | None = None,
        query_lens: Sequence[int] = (),
    ) -> StepContext:
        """The context of a step of `num_tokens` tokens.

        attention: one per cache group. logits_rows: [n], ascending; None: all rows need logits. adapters: (number,
        local rows) of each LoRA adapter in the step. slots, query_lens: state slot and tokens of each sequence; only
        needed with states.
        """
        spans = token_spans(num_tokens, mode.sp)
        counts = [span.size if logits_rows is None else len(rows_within(logits_rows, span)) for span in spans]
        return StepContext(
            collectives=self.groups.by_mode[mode],
            token_spans=spans,
            logits_counts=counts,
            attention=attention[0],
            cache=self.cache,
            backend=self.backend,
            matmul=self.matmul,
            adapters=adapters,
            attention_of_layers=self.cache.groups.each_layer(attention),
            attention_of_groups=attention,
            is_captured=is_captured,
            states=self.states,
            sequences=None if slots is None else StateSequences(slots, query_lens),
        )


def rows_within(rows: np.ndarray, span: Span) -> np.ndarray:
    """The part of ascending `rows` that lies in `span`."""
    first, last = np.searchsorted(rows, [span.start, span.stop])
    return rows[first:last]


def at_least_one(values: np.ndarray) -> np.ndarray:
    """`values` itself, or one zero if it is empty.

    With fewer tokens than token slices some ranks have no token, and models cannot run on empty inputs. Those ranks run
    a dummy token that never leaves them: attention neither sends nor receives it.
    """
    return values if len(values) else np.zeros(1, dtype=np.int64)
