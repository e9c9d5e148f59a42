"""Tokens that the host does not know yet: they go from step to step on the device."""

from __future__ import annotations

import torch

from ulysses_infer.parallel.group import Group


class NextTokenBuffer:
    """The tokens that the last step chose, on the device of every rank, for the next step to begin with."""

    def __init__(self, world: Group | None) -> None:
        self._world = world
        self._tokens: torch.Tensor | None = None

    def share(self, tokens: torch.Tensor | None, count: int, device: torch.device) -> None:
        """Give every rank what rank 0 chose for `count` rows. Collective; tokens: [count] int64 on rank 0, else None.

        Of a row without a token the next step runs any, in vain: its request ends.
        """
        if tokens is None:
            tokens = torch.empty(0, dtype=torch.int64, device=device)
        if self._world is not None:
            counts = [count] + [0] * (len(self._world.ranks) - 1)
            tokens = self._world.gather_rows(tokens[:, None], counts)[:, 0]
        self._tokens = tokens.clamp(min=0)

    def fill_placeholders(self, token_ids: torch.Tensor) -> None:
        """Put tokens where the plan could only say which row of the last step they are of (`plan.placeholder`), in place.

        token_ids: [t] int64.
        """
        assert self._tokens is not None, "a plan awaits tokens that no step was asked to keep"
        chosen = self._tokens[(-1 - token_ids).clamp_(min=0)]
        token_ids.copy_(torch.where(token_ids < 0, chosen, token_ids))
