"""Where the scores of tokens are: in rows with the whole vocabulary, or with the few tokens that a row allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ulysses_infer.model.sampling.transfer import to_device_async

LEAST_WIDTH = 16


class Columns(Protocol):
    """The columns of rows of scores, `[m, C]` in contiguous memory."""

    def take(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The scores of the rows `rows: [m]` of `logits: [n, V]`, a copy: [m, C]."""
        ...

    def places(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Indices into the flat scores of `tokens: [e]` in the rows `rows: [e]`: [e] int64. A token without a column
        has the index of one that is -inf, which logits processors leave at -inf."""
        ...

    def tokens(self, columns: torch.Tensor) -> torch.Tensor:
        """The token of a column of each row, `columns: [m]`: [m] int64; any token for a column that does not exist."""
        ...

    def whole(self, scores: torch.Tensor) -> torch.Tensor:
        """`scores: [m, C]` as rows of the whole vocabulary: [m, V]."""
        ...


class WholeRows:
    """A column for every token."""

    def __init__(self, vocab_size: int) -> None:
        self._size = vocab_size

    def take(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """See `Columns.take`."""
        return logits[rows]

    def places(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See `Columns.places`."""
        return rows * self._size + tokens

    def tokens(self, columns: torch.Tensor) -> torch.Tensor:
        """See `Columns.tokens`."""
        return columns

    def whole(self, scores: torch.Tensor) -> torch.Tensor:
        """See `Columns.whole`."""
        return scores


class FewColumns:
    """Columns for the tokens of each row in ascending order, then at least one that is -inf.

    Since the order is that of the vocabulary, ties, truncation and draws by inverse transform give the same token as in
    whole rows in which all other tokens are -inf.
    """

    def __init__(self, allowed: Sequence[npt.NDArray[np.int64]], vocab_size: int, like: torch.Tensor) -> None:
        """allowed: the tokens of each row, ascending. like: any tensor on their device."""
        longest = max(map(len, allowed))
        # Powers of two: memory is reused, and a GPU kernel sees few widths.
        width = max(LEAST_WIDTH, 1 << longest.bit_length())
        on_host = np.full((len(allowed), width), vocab_size, dtype=np.int64)
        for row, tokens in enumerate(allowed):
            on_host[row, : len(tokens)] = tokens
        self._size, self._width = vocab_size, width
        self._token_ids = to_device_async(on_host, like)  # [m, C], V in columns without a token
        keys = on_host + np.arange(len(allowed))[:, None] * (vocab_size + 1)
        self._keys = to_device_async(keys.reshape(-1), like)  # [m * C], ascending

    def take(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """See `Columns.take`. All scores of a row with a NaN or an infinite logit are -inf."""
        taken = logits[rows[:, None], self._token_ids.clamp(max=self._size - 1)]
        is_broken = ~logits.amax(-1)[rows].isfinite()
        return taken.masked_fill_((self._token_ids == self._size) | is_broken[:, None], -torch.inf)

    def places(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See `Columns.places`."""
        wanted = rows * (self._size + 1) + tokens
        found = torch.searchsorted(self._keys, wanted).clamp_(max=len(self._keys) - 1)
        return torch.where(self._keys[found] == wanted, found, (rows + 1) * self._width - 1)

    def tokens(self, columns: torch.Tensor) -> torch.Tensor:
        """See `Columns.tokens`."""
        return self._token_ids.gather(1, columns.clamp(0, self._width - 1)[:, None])[:, 0]

    def whole(self, scores: torch.Tensor) -> torch.Tensor:
        """See `Columns.whole`. Tokens without a column have -inf."""
        rows = scores.new_full((len(scores), self._size + 1), -torch.inf)
        return rows.scatter_(1, self._token_ids, scores)[:, : self._size]
