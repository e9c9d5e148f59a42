"""Tokens that stay on the device: the next step starts with them before the host knows them."""

from __future__ import annotations

import torch

from ulysses_infer.parallel.group import ProcessGroup


class NextTokenBuffer:
    """The tokens that the last step chose, on the device of every rank."""

    def __init__(self, world: ProcessGroup | None) -> None:
        """world: the process group of all ranks; None for a single rank."""
        self._world = world
        self._tokens: torch.Tensor | None = None

    def share(self, tokens: torch.Tensor | None, count: int, device: torch.device) -> None:
        """Broadcast the tokens of `count` rows from rank 0. Collective. tokens: [count] int64 on rank 0, else None.

        A row without a token gets token 0: its request ends, and the next step's result for it is dropped.
        """
        if tokens is None:
            tokens = torch.empty(0, dtype=torch.int64, device=device)
        if self._world is not None:
            counts = [count] + [0] * (len(self._world.ranks) - 1)
            tokens = self._world.gather_rows(tokens[:, None], counts)[:, 0]
        self._tokens = tokens.clamp(min=0)

    @property
    def tokens(self) -> torch.Tensor:
        """The tokens, [count] int64."""
        assert self._tokens is not None, "no step has shared its tokens"
        return self._tokens

    def fill_placeholders(self, token_ids: torch.Tensor) -> None:
        """Replace placeholder tokens (`step_plan.placeholder`) in place. token_ids: [t] int64."""
        assert self._tokens is not None, "a plan has placeholder tokens, but the step before kept none"
        chosen = self._tokens[(-1 - token_ids).clamp_(min=0)]
        token_ids.copy_(torch.where(token_ids < 0, chosen, token_ids))
