"""The state of one output in its grammar: which tokens may come next, and which must."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from ulysses_infer.model.sampling.token_mask import TokenMask


class GrammarState:
    """The state of one output in its grammar. It follows the output's token ids, so recomputation changes nothing."""

    def __init__(
        self,
        matcher: Any,
        vocab_size: int,
        end_token_ids: Collection[int],
        spell: Callable[[bytes], Sequence[int]],
        first: FirstToken | None = None,
    ) -> None:
        """end_token_ids: tokens that end the output, allowed wherever the grammar may end. spell: the tokens of a text.
        first: given if the first token counts without its space."""
        self._matcher, self._vocab_size, self._spell, self._first = matcher, vocab_size, spell, first
        self._end_token_ids = [token for token in end_token_ids if token < vocab_size]
        self._num_consumed = 0

    def fork(self) -> GrammarState:
        """A copy of the state, to follow tokens that the output may not get."""
        matcher = self._matcher.deep_copy()
        forked = GrammarState(matcher, self._vocab_size, self._end_token_ids, self._spell, self._first)
        forked._num_consumed = self._num_consumed
        return forked

    def count_allowed(self, output_token_ids: Sequence[int], more: Sequence[int]) -> int:
        """How many of the tokens `more` may follow `output_token_ids` one after another; at least one token of the
        output must exist."""
        self._follow(output_token_ids)
        return 0 if self._matcher.is_error() else int(self._matcher.validate_tokens(list(more)))

    def forced_tokens(self, output_token_ids: Sequence[int]) -> tuple[int, ...]:
        """Tokens of the text that must follow `output_token_ids`, none if there is a choice. Other tokens may spell it
        too, or a longer text; at least one token of the output must exist."""
        self._follow(output_token_ids)
        text = b"" if self._matcher.is_error() else bytes(self._matcher.compute_ff_bytes())
        return tuple(self._spell(text)) if text else ()

    @property
    def may_end(self) -> bool:
        """Whether the output so far matches the whole grammar."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    def mask(self, output_token_ids: Sequence[int]) -> TokenMask:
        """The tokens that may come after `output_token_ids`.

        None may if the grammar is complete and no token can end the output, or if it became too complex to follow.
        """
        self._follow(output_token_ids)
        matcher = self._first.matcher if self._first is not None and not self._num_consumed else self._matcher
        bits = None if matcher.is_stopped() else matcher.compute_bitmask()
        mask = TokenMask(None if matcher.is_error() else bits, self._vocab_size)
        mask.set(self._end_token_ids, self.may_end)
        return mask

    def _follow(self, output_token_ids: Sequence[int]) -> None:
        """Consume the tokens that are new in the output."""
        for token in output_token_ids[self._num_consumed :]:
            self._consume(token)
            self._num_consumed += 1

    def _consume(self, token: int) -> None:
        spelled = (token,) if self._first is None or self._num_consumed else self._first.spell(token)
        for each in spelled:
            self._matcher.consume_token(each)


class FirstToken(NamedTuple):
    """How the first token of an output is read if it counts without its space."""

    matcher: Any
    """A matcher in its initial state, for which tokens begin without a space."""
    spell: Callable[[int], Sequence[int]]
    """Tokens with the text that the token has in this place."""
