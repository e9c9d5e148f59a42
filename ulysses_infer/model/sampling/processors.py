"""Logits processors: they change scores in place, in vLLM's order: grammar, allowed_token_ids, bad_words, min_tokens,
logit_bias, penalties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ulysses_infer.model.sampling.columns import Columns, FewColumns
from ulysses_infer.model.sampling.row import Constraints, SamplingRow, has_penalties
from ulysses_infer.model.sampling.token_mask import TokenMask
from ulysses_infer.model.sampling.transfer import to_device_async


def apply_processors(
    scores: torch.Tensor, rows: Sequence[SamplingRow], constraints: Sequence[Constraints], columns: Columns
) -> None:
    """Apply what the rows ask for to `scores: [m, C]`, contiguous, with the columns `columns`."""
    if not isinstance(columns, FewColumns):  # few columns are those of the allowed tokens
        _apply_grammars(scores, [each.mask for each in constraints])
        _apply_allowed_tokens(scores, rows)
    flat = scores.view(-1)
    _apply_forbidden_tokens(flat, constraints, columns)
    _apply_logit_bias(flat, rows, columns)
    _apply_penalties(flat, rows, columns)


def _apply_grammars(scores: torch.Tensor, masks: Sequence[TokenMask | None]) -> None:
    for index, mask in enumerate(masks):
        if mask is not None:
            penalties = mask.penalties()
            scores[index] += torch.from_numpy(penalties) if scores.is_cpu else to_device_async(penalties, scores)


def _apply_allowed_tokens(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    for index, row in enumerate(rows):
        if row.params.allowed_token_ids:
            allowed = to_device_async(row.params.allowed_token_ids, scores)
            kept = scores[index, allowed]
            scores[index] = -torch.inf
            scores[index, allowed] = kept


def _apply_forbidden_tokens(flat: torch.Tensor, constraints: Sequence[Constraints], columns: Columns) -> None:
    token_ids = np.concatenate([each.forbidden for each in constraints])
    if token_ids.size:
        row_ids = np.repeat(np.arange(len(constraints)), [len(each.forbidden) for each in constraints])
        rows, tokens = to_device_async(np.stack([row_ids, token_ids]), flat)
        flat[columns.places(rows, tokens)] = -torch.inf


def _apply_logit_bias(flat: torch.Tensor, rows: Sequence[SamplingRow], columns: Columns) -> None:
    entries = [(index, *item) for index, row in enumerate(rows) for item in (row.params.logit_bias or {}).items()]
    if entries:
        row_ids, token_ids, biases = zip(*entries, strict=True)
        places = columns.places(to_device_async(row_ids, flat), to_device_async(token_ids, flat))
        flat[places] += to_device_async(biases, flat, flat.dtype)


def _apply_penalties(flat: torch.Tensor, rows: Sequence[SamplingRow], columns: Columns) -> None:
    """Repetition (Keskar et al. 2019, arXiv 1909.05858), then frequency and presence penalties (OpenAI's)."""
    entries = [
        (index, row.params, row.history(flat.device)) for index, row in enumerate(rows) if has_penalties(row.params)
    ]
    if not entries:
        return
    indices, params, histories = zip(*entries, strict=True)
    lengths = [len(history.token_ids) for history in histories]
    spread = to_device_async(np.repeat(np.arange(len(entries)), lengths), flat)  # the entry of each token

    def per_token(values: Sequence[float]) -> torch.Tensor:
        return to_device_async(values, flat)[spread]

    token_ids = torch.cat([history.token_ids for history in histories])
    counts = torch.cat([history.counts for history in histories])
    places = columns.places(per_token(indices), token_ids)
    repetition = per_token([p.repetition_penalty for p in params])
    old = flat[places]
    new = torch.where(old > 0, old / repetition, old * repetition)
    new -= per_token([p.frequency_penalty for p in params]) * counts
    new -= per_token([p.presence_penalty for p in params]) * (counts > 0)
    flat[places] = new
