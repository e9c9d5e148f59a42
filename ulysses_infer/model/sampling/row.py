"""The sampling state of one sequence: its parameters, what it has output, and what constrains its next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ulysses_infer.model.sampling.token_mask import TokenMask
from ulysses_infer.model.sampling.transfer import to_device_async
from ulysses_infer.sampling_params import SamplingParams

NO_TOKENS = np.empty(0, dtype=np.int64)
FEW = 1024
"""The most allowed tokens of a row for which only these are sampled, instead of the whole vocabulary."""


class Constraints(NamedTuple):
    """What may come at a position."""

    mask: TokenMask | None
    """What the grammar allows; None without a grammar."""
    few: npt.NDArray[np.int64] | None
    """The tokens that grammar and `allowed_token_ids` allow, ascending, if there are few; None if there are many."""
    forbidden: npt.NDArray[np.int64]
    """What `min_tokens` and `bad_words` forbid."""


NOTHING_ALLOWED = Constraints(None, NO_TOKENS, NO_TOKENS)


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
        or has_penalties(params)
    )


def reads_outputs(params: SamplingParams) -> bool:
    """Whether logits processors of these parameters read the earlier output tokens."""
    return bool(params.structured_outputs or params.bad_words) or has_penalties(params)


def has_penalties(params: SamplingParams) -> bool:
    """Whether a repetition, presence or frequency penalty changes the logits."""
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

    def mask(self, output_token_ids: Sequence[int]) -> TokenMask:
        """The tokens that may come after `output_token_ids`."""

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
        forbidden = NO_TOKENS if self.bad_words is None else self.bad_words.completing(self.output_token_ids)
        if self.position < self.params.min_tokens:
            endings = [*self.eos_token_ids, *(self.params.stop_token_ids or ())]
            forbidden = np.append(forbidden, np.array(endings, dtype=np.int64))
        return forbidden

    def constraints(self) -> Constraints:
        """What may come at the next position."""
        try:
            mask = None if self.grammar is None else self.grammar.mask(self.output_token_ids)
            forbidden = self.forbidden_token_ids()
        except Exception as error:  # grammar and tokenizer libraries raise anything; the other rows must go on
            self.error = error
        if self.error is not None:
            return NOTHING_ALLOWED
        return Constraints(mask, self._few_tokens(mask), forbidden)

    def _few_tokens(self, mask: TokenMask | None) -> npt.NDArray[np.int64] | None:
        """See `Constraints.few`."""
        if self.draft is not None:
            return None  # rejection sampling compares whole distributions
        allowed = self.params.allowed_token_ids
        if not allowed:
            return None if mask is None else mask.few_token_ids(FEW)
        if len(allowed) > FEW:
            return None
        tokens = np.unique(np.array(allowed, dtype=np.int64))
        return tokens if mask is None else tokens[mask.contains(tokens)]
