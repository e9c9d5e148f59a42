"""The state of one output in its grammar: which tokens may come next, and which must."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Penalties = npt.NDArray[np.float32]


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

    def penalties(self, output_token_ids: Sequence[int]) -> Penalties:
        """The penalties for the token after `output_token_ids`, to be added to the logits: [V] float32, 0 or -inf.

        All are -inf if the grammar is complete and no token can end the output, or if it became too complex to follow.
        """
        self._follow(output_token_ids)
        matcher = self._first.matcher if self._first is not None and not self._num_consumed else self._matcher
        if matcher.is_stopped():
            penalties = np.full(self._vocab_size, -np.inf, dtype=np.float32)
        else:
            penalties = unpack(matcher.compute_bitmask(), self._vocab_size)
            if matcher.is_error():
                penalties.fill(-np.inf)
        penalties[self._end_token_ids] = 0.0 if self.may_end else -np.inf
        return penalties

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


_PENALTIES = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf)
_PENALTIES_OF_BYTE = _PENALTIES.astype(np.float32)  # [256, 8]: a look-up is several times faster than masking by bits


def unpack(bitmask: bytes, vocab_size: int) -> Penalties:
    """A mask of one bit per token as penalties: [V], 0 where the bit is set, else -inf."""
    return _PENALTIES_OF_BYTE.take(np.frombuffer(bitmask, dtype=np.uint8), axis=0).reshape(-1)[:vocab_size]
