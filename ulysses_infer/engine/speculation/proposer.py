"""The interface of proposers: what may follow a request's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from ulysses_infer.engine.request import Request


class Query(NamedTuple):
    """One request that a step may draft tokens for."""

    request: Request
    first: tuple[int, ...]
    """Tokens that are drafted already, because a grammar forces them."""
    most: int
    """The most tokens to propose after them."""
    rate: float = 1.0
    """The share of the request's proposed tokens that was right so far, relative to their confidences."""
    least: tuple[float, ...] = ()
    """The chance to be right that makes one more token worth its time, by the tokens before it, if the proposer knows
    these; none: each is worth it."""


class Draft(NamedTuple):
    """Proposed tokens of one request."""

    tokens: tuple[int, ...]
    confidences: tuple[float, ...]
    """For each token, the proposer's estimate, 0 to 1, that it is right if those before it are."""
    sources: tuple[torch.Tensor | None, ...] = ()
    """For rejection sampling, the distribution that each token was drawn from, [V] int64 masses; None, or too few
    entries: the token was certain."""

    def upto(self, count: int) -> Draft:
        """The first `count` tokens."""
        return Draft(self.tokens[:count], self.confidences[:count], self.sources[:count])

    def after(self, first: Sequence[int]) -> Draft:
        """The draft behind tokens that are certain."""
        certain = len(first)
        return Draft((*first, *self.tokens), (1.0,) * certain + self.confidences, (None,) * certain + self.sources)


NOTHING = Draft((), ())


class Proposer(Protocol):
    """Proposes tokens on rank 0, for all requests of a step at once.

    A wrong proposal costs time and never changes an output, so a proposer may use anything that it knows.
    """

    def propose(self, queries: Sequence[Query]) -> list[Draft]:
        """The proposal for each query, `NOTHING` where there is none."""
        ...

    def forget(self, request: Request) -> None:
        """`request` has ended."""
        ...


@runtime_checkable
class CostlyProposer(Proposer, Protocol):
    """A proposer that takes time which depends on the number of tokens, such as that of a model."""

    @property
    def is_gradual(self) -> bool:
        """Whether it knows each token before it drafts the next one, and so minds `Query.least`."""
        ...

    def draft_seconds(self, requests: Sequence[Request], count: int) -> float:
        """The expected time to propose `count` tokens for each of `requests`."""
        ...

    def reset(self) -> None:
        """The caches have lost their memory: forget what they hold."""
        ...
