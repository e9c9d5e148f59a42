"""The sampler: turns logits into token ids, on rank 0.

Logits processors run first (`processors.py`). Then greedy rows take the argmax. The others apply temperature, min_p,
top_k and top_p, and draw a token (`draw.py`). Greedy rows without processors cost one argmax. Where a grammar or
`allowed_token_ids` allow few tokens, all this is done on the logits of these tokens alone, with the same result.

A draw takes one uniform random number per token, a pure function of (seed, position in the output). So the result does
not depend on batch, mode or preemption.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ulysses_infer.model.sampling.columns import Columns, FewColumns, WholeRows
from ulysses_infer.model.sampling.draw import draw, draw_unless_accepted, draw_unless_source_accepted
from ulysses_infer.model.sampling.processors import apply_processors
from ulysses_infer.model.sampling.row import FEW, Constraints, SamplingRow
from ulysses_infer.model.sampling.seeds import acceptance_number, uniform
from ulysses_infer.model.sampling.transfer import to_device_async

NO_TOKEN = -1  # the result of a row without any possible token: all forbidden, or logits not finite
MAX_ELEMENTS = 2**24  # rows * vocabulary processed at a time; bounds temporaries to a few hundred MiB


class Sampler:
    """Chooses the next token of each row. Stateless: state across steps is in the rows."""

    def sample(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
        """One token id per row of `logits: [n, V]` float32, which is not modified; see `choose`."""
        tokens: list[int] = self.choose(logits, rows).tolist()
        return tokens

    def choose(
        self, logits: torch.Tensor, rows: Sequence[SamplingRow], processed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One token id per row, as [n] int64 on the device of `logits`. Does not synchronize with a GPU (unless a row
        `reads_outputs`).

        A row without any possible token gets `NO_TOKEN`. processed: a copy of `logits`, in which rows with processors
        and a possible token are replaced by what these make of them.
        """
        if processed is None and len(rows) * logits.shape[1] <= MAX_ELEMENTS and all(map(_is_simple, rows)):
            return _unless_impossible(*_choose_tokens(logits, rows))
        tokens = torch.full((len(rows),), NO_TOKEN, dtype=torch.int64, device=logits.device)
        plain = [index for index, row in enumerate(rows) if row.is_plain]
        if plain:
            self._store(tokens, plain, *_most_likely(_take_rows(logits, plain)))
        constraints = {index: row.constraints() for index, row in enumerate(rows) if not row.is_plain}
        many = [index for index, each in constraints.items() if each.few is None]
        for chunk in _chunks(many, max(MAX_ELEMENTS // logits.shape[1], 1)):
            self._choose_special(tokens, logits, rows, constraints, chunk, WholeRows(logits.shape[1]), processed)
        few = {index: each.few for index, each in constraints.items() if each.few is not None and each.few.size}
        for chunk in _chunks([*few], max(MAX_ELEMENTS // FEW, 1)):
            columns = FewColumns([few[index] for index in chunk], logits.shape[1], logits)
            self._choose_special(tokens, logits, rows, constraints, chunk, columns, processed)
        return tokens

    def _choose_special(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        rows: Sequence[SamplingRow],
        constraints: Mapping[int, Constraints],
        chunk: list[int],
        columns: Columns,
        processed: torch.Tensor | None,
    ) -> None:
        """Choose `tokens` of the rows `chunk`, after logits processors, by their scores in `columns`."""
        places, chunk_rows = to_device_async(chunk, logits), [rows[index] for index in chunk]
        scores = columns.take(logits, places)
        apply_processors(scores, chunk_rows, [constraints[index] for index in chunk], columns)
        if processed is not None:
            processed[places] = columns.whole(scores)
        chosen, peak = _choose_tokens(scores, chunk_rows)
        self._store(tokens, chunk, columns.tokens(chosen), peak)

    def _store(self, tokens: torch.Tensor, indices: list[int], chosen: torch.Tensor, peak: torch.Tensor) -> None:
        """Write `chosen: [m]` at `indices`; NO_TOKEN where `peak: [m]`, the largest score, is not finite."""
        tokens[to_device_async(indices, tokens)] = _unless_impossible(chosen, peak)


def _is_simple(row: SamplingRow) -> bool:
    """Whether the row's scores are its logits as they are."""
    return not row.has_processors and row.error is None


def _unless_impossible(chosen: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """`chosen: [m]`, but NO_TOKEN where the largest score, `peak: [m]`, is not finite."""
    return torch.where(peak.isfinite(), chosen, NO_TOKEN)


def _take_rows(logits: torch.Tensor, indices: list[int]) -> torch.Tensor:
    return logits if len(indices) == len(logits) else logits[to_device_async(indices, logits)]


def _chunks(indices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _most_likely(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and score of the largest entry per row, the lowest id on ties; a NaN counts as the largest."""
    best = scores.argmax(-1)
    return best, scores.gather(-1, best[:, None])[:, 0]


def _choose_tokens(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy or random token per row, and the row's largest score."""
    tokens, peak = _most_likely(scores)
    random = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    drawn = [index for index in random if rows[index].draft is None]
    if len(drawn) == len(rows):
        return draw(scores, peak, [row.params for row in rows], _numbers(rows, drawn)), peak
    if drawn:
        places = to_device_async(drawn, scores)
        params = [rows[index].params for index in drawn]
        tokens[places] = draw(_take_rows(scores, drawn), peak[places], params, _numbers(rows, drawn))
    drafted = [index for index in random if rows[index].draft is not None]
    for has_source in (False, True):
        group = [index for index in drafted if (rows[index].draft_source is not None) == has_source]
        if group:
            places = to_device_async(group, scores)
            tokens[places] = _choose_after_drafts(scores[places], peak[places], [rows[index] for index in group])
    return tokens, peak


def _choose_after_drafts(scores: torch.Tensor, peak: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Rejection sampling of each row's draft. All rows have a source, or none."""
    params, drafts = [row.params for row in rows], [row.draft or 0 for row in rows]
    accepting = [acceptance_number(row.seed, row.position) for row in rows]
    numbers = _numbers(rows, range(len(rows)))
    sources = [row.draft_source for row in rows if row.draft_source is not None]
    if not sources:
        return draw_unless_accepted(scores, peak, params, numbers, drafts, accepting)
    return draw_unless_source_accepted(scores, peak, params, numbers, drafts, accepting, torch.stack(sources))


def _numbers(rows: Sequence[SamplingRow], indices: Sequence[int]) -> list[float]:
    """The random number of each row's position."""
    return [uniform(rows[index].seed, rows[index].position) for index in indices]
