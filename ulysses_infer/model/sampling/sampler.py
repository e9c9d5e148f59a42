"""The sampler: turns logits into token ids, on rank 0.

Logits processors run in vLLM's order: grammar, allowed_token_ids, bad_words, min_tokens, logit_bias, penalties. Then
greedy rows take the argmax. The others apply temperature, min_p, top_k and top_p, and draw a token (`draw.py`). Greedy
rows without processors cost one argmax.

A draw takes one uniform random number per token, a pure function of (seed, position in the output). So the result does
not depend on batch, mode or preemption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ulysses_infer.model.sampling.draw import draw, draw_unless_accepted, draw_unless_source_accepted
from ulysses_infer.model.sampling.seeds import acceptance_number, uniform
from ulysses_infer.model.sampling.transfer import to_device_async
from ulysses_infer.sampling_params import SamplingParams

NONE_FORBIDDEN = np.empty(0, dtype=np.int64)
NO_TOKEN = -1  # the result of a row without any possible token: all forbidden, or logits not finite
MAX_ELEMENTS = 2**24  # rows * vocabulary processed at a time; bounds temporaries to a few hundred MiB


def needs_full_logits(params: SamplingParams) -> bool:
    """Whether sampling needs all logits on one rank. If not, each rank's largest logit is enough."""
    return not params.is_greedy or _has_processors(params)


def _has_processors(params: SamplingParams) -> bool:
    return bool(
        params.structured_outputs
        or params.allowed_token_ids
        or params.bad_words
        or params.min_tokens
        or params.logit_bias
        or _has_penalties(params)
    )


def reads_outputs(params: SamplingParams) -> bool:
    """Whether logits processors of these parameters read the earlier output tokens."""
    return bool(params.structured_outputs or params.bad_words) or _has_penalties(params)


def _has_penalties(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)


class TokenCounts(NamedTuple):
    """Token counts for penalties, as in `TokenHistory`."""

    token_ids: torch.Tensor  # [u] int64
    counts: torch.Tensor  # [u] float32

    def with_tokens(self, more: Sequence[int]) -> TokenCounts:
        """These counts with one more occurrence in the output of each of `more`."""
        tokens = to_device_async(more, self.token_ids, torch.int64)
        distinct, counts = tokens.unique(return_counts=True)
        matches = self.token_ids[:, None] == distinct  # [u, d]
        added = self.counts + matches.to(self.counts.dtype) @ counts.to(self.counts.dtype)
        is_new = ~matches.any(0)
        return TokenCounts(
            torch.cat([self.token_ids, distinct[is_new]]), torch.cat([added, counts[is_new].to(added.dtype)])
        )


class TokenHistory:
    """Token counts of a row for penalties, kept across steps so that a long prompt is counted once.

    token_ids: [u] int64, the distinct tokens of prompt and output; counts: [u] float32, occurrences in the output.
    """

    def __init__(self, prompt_token_ids: Sequence[int], device: torch.device) -> None:
        distinct = list(dict.fromkeys(prompt_token_ids))
        self.counts = torch.zeros(len(distinct), device=device)
        self.token_ids = to_device_async(distinct, self.counts, torch.int64)
        self._slots = {token: slot for slot, token in enumerate(distinct)}
        self._num_counted = 0

    def update(self, output_token_ids: Sequence[int]) -> None:
        """Count the output tokens added since the last call."""
        new = output_token_ids[self._num_counted :]
        slots = [self._slots.setdefault(token, len(self._slots)) for token in new]
        num_known = len(self.token_ids)
        unseen = list(dict.fromkeys(t for t, slot in zip(new, slots, strict=True) if slot >= num_known))
        if unseen:
            self.token_ids = torch.cat([self.token_ids, to_device_async(unseen, self.token_ids)])
            self.counts = torch.cat([self.counts, self.counts.new_zeros(len(unseen))])
        where = to_device_async(slots, self.token_ids, torch.int64)
        self.counts.index_add_(0, where, torch.ones_like(where, dtype=self.counts.dtype))
        self._num_counted = len(output_token_ids)


class Grammar(Protocol):
    """The state of a structured output (`text/structured.py`)."""

    @property
    def may_end(self) -> bool:
        """Whether the output so far is a complete match."""

    def penalties(self, output_token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """The bias to add to the logits after `output_token_ids`: [V], 0 or -inf."""

    def fork(self) -> Grammar:
        """A copy of the state, to follow drafted tokens."""

    def count_allowed(self, output_token_ids: Sequence[int], more: Sequence[int]) -> int:
        """How many of the tokens `more` may follow `output_token_ids`, one after another."""

    def forced_tokens(self, output_token_ids: Sequence[int]) -> tuple[int, ...]:
        """Tokens of the text that must follow `output_token_ids`; other tokens may spell it too."""


class ForbiddenWords(Protocol):
    """The bad words of a request (`text/bad_words.py`)."""

    def completing(self, output_token_ids: Sequence[int]) -> npt.NDArray[np.int64]:
        """Tokens that would complete a bad word after `output_token_ids`."""


@dataclass(eq=False)
class SamplingRow:
    """Sampling state of one sequence. Keep it for the sequence's lifetime: it holds the counts for penalties.

    `output_token_ids` is the sequence's growing list; `seed` comes from `derive_seed`, `bad_words` from
    `params.bad_words`, and `grammar`, not shared with other rows, from `params.structured_outputs`. All token ids,
    those in `eos_token_ids` included, must be below the vocabulary's size.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    eos_token_ids: frozenset[int] = frozenset()
    bad_words: ForbiddenWords | None = None
    grammar: Grammar | None = None
    num_placeholders: int = 0
    """Output tokens that are sampled but not in the list yet."""
    error: Exception | None = None
    """What went wrong in this row's constraints. The row gets no token; other rows are not affected."""
    draft: int | None = None
    """The drafted token at this position, if rejection sampling may accept it; None: the position's own token is drawn.
    """
    draft_source: torch.Tensor | None = None
    """The distribution that `draft` was drawn from, [V] int64 masses; None: the draft was certain."""
    is_plain: bool = field(init=False)  # greedy on the raw logits
    has_processors: bool = field(init=False)
    _history: TokenHistory | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self.is_plain = not needs_full_logits(self.params)
        constraints = self.grammar, self.bad_words
        self.has_processors = _has_processors(self.params) or any(each is not None for each in constraints)

    @property
    def position(self) -> int:
        """Index of the next token in the output."""
        return len(self.output_token_ids) + self.num_placeholders

    @property
    def may_end(self) -> bool:
        """Whether the grammar lets the output end here, so that having no next token is not an error."""
        return self.grammar is not None and self.grammar.may_end

    @property
    def is_constrained(self) -> bool:
        """Whether the request forbids tokens, so that none may be left."""
        allowed = self.params.allowed_token_ids is not None
        return allowed or self.grammar is not None or self.forbidden_token_ids().size > 0

    def history(self, device: torch.device) -> TokenHistory | TokenCounts:
        """The token counts of this row, updated with `output_token_ids`."""
        if self._history is None:
            self._history = TokenHistory(self.prompt_token_ids, device)
        self._history.update(self.output_token_ids)
        return self._history

    def forbidden_token_ids(self) -> npt.NDArray[np.int64]:
        """Tokens that `min_tokens` and `bad_words` forbid at the next position."""
        forbidden = NONE_FORBIDDEN if self.bad_words is None else self.bad_words.completing(self.output_token_ids)
        if self.position < self.params.min_tokens:
            endings = [*self.eos_token_ids, *(self.params.stop_token_ids or ())]
            forbidden = np.append(forbidden, np.array(endings, dtype=np.int64))
        return forbidden

    def constraints(self) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.int64]]:
        """The grammar's penalties ([V], None without a grammar) and the forbidden tokens of the next position."""
        try:
            penalties = None if self.grammar is None else self.grammar.penalties(self.output_token_ids)
            return penalties, self.forbidden_token_ids()
        except Exception as error:  # grammar and tokenizer libraries raise anything; the other rows must go on
            self.error = error
            return None, NONE_FORBIDDEN


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
        are replaced by what these make of them.
        """
        if processed is None and len(rows) * logits.shape[1] <= MAX_ELEMENTS and all(map(_is_simple, rows)):
            return _unless_impossible(*_choose_tokens(logits, rows))
        tokens = torch.full((len(rows),), NO_TOKEN, dtype=torch.int64, device=logits.device)
        plain = [index for index, row in enumerate(rows) if row.is_plain]
        if plain:
            self._store(tokens, plain, *_most_likely(_take_rows(logits, plain)))
        special = [index for index, row in enumerate(rows) if not row.is_plain]
        for chunk in _chunks(special, max(MAX_ELEMENTS // logits.shape[1], 1)):
            scores, chunk_rows = logits[to_device_async(chunk, logits)], [rows[index] for index in chunk]
            _apply_processors(scores, chunk_rows)
            if processed is not None:
                processed[to_device_async(chunk, processed)] = scores
            self._store(tokens, chunk, *_choose_tokens(scores, chunk_rows))
        return tokens

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


# --- logits processors: they change `scores: [m, V]` in place ---


def _apply_processors(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    penalties, forbidden = zip(*(row.constraints() for row in rows), strict=True)
    _apply_grammars(scores, penalties)
    _apply_allowed_tokens(scores, rows)
    _apply_forbidden_tokens(scores, forbidden)
    _apply_logit_bias(scores, rows)
    _apply_penalties(scores, rows)
    failed = [index for index, row in enumerate(rows) if row.error is not None]
    if failed:
        scores[to_device_async(failed, scores)] = -torch.inf


def _apply_grammars(scores: torch.Tensor, penalties: Sequence[npt.NDArray[np.float32] | None]) -> None:
    for index, row_penalties in enumerate(penalties):
        if row_penalties is not None:
            on_host = torch.from_numpy(row_penalties)
            scores[index] += on_host if scores.is_cpu else to_device_async(row_penalties, scores)


def _apply_allowed_tokens(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    for index, row in enumerate(rows):
        if row.params.allowed_token_ids:
            allowed = to_device_async(row.params.allowed_token_ids, scores)
            kept = scores[index, allowed]
            scores[index] = -torch.inf
            scores[index, allowed] = kept


def _apply_forbidden_tokens(scores: torch.Tensor, forbidden: Sequence[npt.NDArray[np.int64]]) -> None:
    token_ids = np.concatenate(forbidden)
    if token_ids.size:
        row_ids = np.repeat(np.arange(len(forbidden)), [len(tokens) for tokens in forbidden])
        rows, tokens = to_device_async(np.stack([row_ids, token_ids]), scores)
        scores[rows, tokens] = -torch.inf


def _apply_logit_bias(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    entries = [(index, *item) for index, row in enumerate(rows) for item in (row.params.logit_bias or {}).items()]
    if entries:
        row_ids, token_ids, biases = zip(*entries, strict=True)
        scores[to_device_async(row_ids, scores), to_device_async(token_ids, scores)] += to_device_async(
            biases, scores, scores.dtype
        )


def _apply_penalties(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Repetition (Keskar et al. 2019, arXiv 1909.05858), then frequency and presence penalties (OpenAI's)."""
    entries = [
        (index, row.params, row.history(scores.device)) for index, row in enumerate(rows) if _has_penalties(row.params)
    ]
    if not entries:
        return
    indices, params, histories = zip(*entries, strict=True)
    lengths = [len(history.token_ids) for history in histories]
    spread = to_device_async(np.repeat(np.arange(len(entries)), lengths), scores)  # the entry of each token

    def per_token(values: Sequence[float]) -> torch.Tensor:
        return to_device_async(values, scores)[spread]

    row_ids = per_token(indices)
    token_ids = torch.cat([history.token_ids for history in histories])
    counts = torch.cat([history.counts for history in histories])
    repetition = per_token([p.repetition_penalty for p in params])
    old = scores[row_ids, token_ids]
    new = torch.where(old > 0, old / repetition, old * repetition)
    new -= per_token([p.frequency_penalty for p in params]) * counts
    new -= per_token([p.presence_penalty for p in params]) * (counts > 0)
    scores[row_ids, token_ids] = new
