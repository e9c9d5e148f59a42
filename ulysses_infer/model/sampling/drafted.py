"""Sampling rows after drafted tokens: what the next token would be if the draft before it were accepted.

The row after i drafted tokens has the constraints, penalties and random number of its own position, so that the token
chosen from it is the one that a step without speculation would choose there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ulysses_infer.model.sampling.row import SamplingRow, TokenCounts, reads_outputs


@dataclass(eq=False)
class DraftedRow(SamplingRow):
    """The sampling state of a sequence after some drafted tokens. It lives for one step."""

    base: SamplingRow | None = None
    """The state before the drafted tokens."""
    drafts: Sequence[int] = field(default_factory=tuple)
    """The drafted tokens before this position."""

    def history(self, device: torch.device) -> TokenCounts:
        """The counts of `base` and of the drafted tokens."""
        assert self.base is not None
        history = self.base.history(device)
        return TokenCounts(history.token_ids, history.counts).with_tokens(self.drafts)


def rows_after(
    row: SamplingRow,
    drafts: Sequence[int],
    may_replace: bool = False,
    sources: Sequence[torch.Tensor | None] = (),
) -> Iterator[SamplingRow]:
    """The sampling rows of the positions before each token of `drafts` and after the last one: 1 + len(drafts) rows,
    to be used in this order.

    may_replace: apply rejection sampling to the drafted tokens, instead of drawing every position's own token. sources:
    the distributions that they were drawn from; see `SamplingRow.draft_source`.
    """
    replaced: list[int | None] = [*(drafts if may_replace else [None] * len(drafts)), None]
    known = [*sources[: len(drafts)]]
    sources = known + [None] * (len(drafts) + 1 - len(known))
    row.draft, row.draft_source = replaced[0], sources[0]
    yield row
    grammar = row.grammar.fork() if row.grammar is not None and drafts else None
    reads = reads_outputs(row.params)
    for count in range(1, len(drafts) + 1):
        before = drafts[:count]
        yield DraftedRow(
            row.params,
            row.seed,
            row.prompt_token_ids,
            [*row.output_token_ids, *before] if reads else row.output_token_ids,
            row.eos_token_ids,
            row.bad_words,
            grammar,
            0 if reads else count,
            draft=replaced[count],
            draft_source=sources[count],
            base=row,
            drafts=before,
        )
