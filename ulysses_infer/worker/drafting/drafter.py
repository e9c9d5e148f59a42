"""The interface of models that draft tokens, on each rank."""

from __future__ import annotations

from typing import Protocol


class Drafter(Protocol):
    """One rank's part of a model that drafts tokens.

    Rank 0 drafts between two steps, when it knows the accepted tokens of the first. It sends the other ranks a message
    of kind `DRAFT` for everything that they have to do, and does the same itself. Nothing is decided on other ranks.
    """

    def run(self, payload: bytes) -> None:
        """Do this rank's part of what rank 0 does, which has sent `payload`. Not called on rank 0."""
        ...

    def take_caches(self) -> None:
        """Allocate the memory of keys and values, after `release_caches`."""
        ...

    def release_caches(self) -> None:
        """Free the memory of keys and values until `take_caches`. Graphs that refer to it are dropped."""
        ...
