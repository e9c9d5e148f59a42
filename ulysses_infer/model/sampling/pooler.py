"""One vector of a prompt, from what the vocabulary head reads of its tokens."""

from __future__ import annotations

import torch


class Pooler:
    """Collects the hidden states of a prompt, chunk by chunk. kind: last, mean or cls, see `POOLINGS`."""

    def __init__(self, kind: str, num_tokens: int) -> None:
        self._kind, self._num_tokens = kind, num_tokens
        self._sum: torch.Tensor | None = None
        self._num_added = 0
        self._vector: list[float] | None = None

    def add(self, position: int, hidden: torch.Tensor) -> None:
        """hidden: [D], of the token at `position`. A prompt that is computed again begins at 0 again."""
        is_wanted = {"last": position == self._num_tokens - 1, "cls": position == 0}.get(self._kind)
        if is_wanted is False or position >= self._num_tokens:
            return
        row = hidden.float()
        if self._kind != "mean" or position == 0 or self._sum is None:
            self._sum, self._num_added = row.clone(), 1
        elif position == self._num_added:  # otherwise another sequence of the prompt has added it
            self._sum += row
            self._num_added += 1

    def vector(self) -> list[float] | None:
        """The vector, [D]; None before the prompt is computed. Waits for a GPU."""
        is_complete = self._kind != "mean" or self._num_added == self._num_tokens
        if self._vector is None and self._sum is not None and is_complete:
            values: list[float] = (self._sum / self._num_added).tolist()
            self._vector = values
        return self._vector
