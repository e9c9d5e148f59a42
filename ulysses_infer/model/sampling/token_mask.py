"""Which tokens may come next: one bit per token, as grammar libraries give it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_PENALTIES_OF_BYTE = np.where(_BITS, 0.0, -np.inf).astype(np.float32)  # [256, 8]: faster than masking by bits


class TokenMask:
    """The tokens of a vocabulary that may come next."""

    def __init__(self, bits: bytes | None, vocab_size: int) -> None:
        """bits: one per token, the lowest of each byte first, at least `vocab_size`; None: no token may come."""
        self._size = vocab_size
        num_bytes = (vocab_size + 7) // 8
        self._bytes = np.zeros(num_bytes, dtype=np.uint8)
        if bits is not None:
            self._bytes[:] = np.frombuffer(bits, dtype=np.uint8)[:num_bytes]
            self._bytes[-1] &= 0xFF >> -vocab_size % 8  # bits beyond the vocabulary

    def set(self, token_ids: Sequence[int], may_come: bool) -> None:
        """Let tokens come next, or not."""
        for token in token_ids:
            if may_come:
                self._bytes[token >> 3] |= 1 << (token & 7)
            else:
                self._bytes[token >> 3] &= 0xFF ^ 1 << (token & 7)

    def contains(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each of `token_ids: [n]` may come next: [n]."""
        return (self._bytes[token_ids >> 3] >> (token_ids & 7) & 1).astype(np.bool_)

    def token_ids(self) -> npt.NDArray[np.int64]:
        """The tokens that may come next, ascending."""
        places = np.flatnonzero(self._bytes)
        bytes_, bits = np.nonzero(_BITS[self._bytes[places]])
        return places[bytes_] * 8 + bits

    def few_token_ids(self, most: int) -> npt.NDArray[np.int64] | None:
        """`token_ids`, or None if there are more than `most`; takes time for the tokens only if they are few."""
        if np.count_nonzero(self._bytes) > most:
            return None
        found = self.token_ids()
        return found if len(found) <= most else None

    def penalties(self) -> npt.NDArray[np.float32]:
        """What to add to the logits: [V], 0 for tokens that may come next, else -inf."""
        return _PENALTIES_OF_BYTE.take(self._bytes, axis=0).reshape(-1)[: self._size]
