"""How many of a request's drafted tokens are right, observed while it runs."""

from __future__ import annotations

from collections.abc import Sequence

PRIOR = 0.7  # before anything was verified
LEAST_PRIOR = 0.5  # of a new request, however few tokens of others were accepted: it must be tried
PRIOR_WEIGHT = 1.0  # tokens that the prior counts as
KEPT = 0.95  # of what was observed, per verified step
KEPT_UNUSED = 0.99  # the same, per step without drafts: a request that stopped drafting tries again at last


class Acceptance:
    """The rate at which a request's drafted tokens are accepted, relative to the proposer's confidence."""

    def __init__(self, usual: float = PRIOR) -> None:
        """usual: the rate of other requests, from which this one starts."""
        self._prior = max(usual, LEAST_PRIOR)
        self._accepted = 0.0
        self._expected = 0.0

    @property
    def rate(self) -> float:
        """The chance, 0 to 1, that a token drafted with confidence 1 is right if those before it are."""
        return (self._accepted + self._prior * PRIOR_WEIGHT) / (self._expected + PRIOR_WEIGHT)

    def observe(self, confidences: Sequence[float], num_accepted: int) -> None:
        """Learn from a verified draft. Tokens after the first wrong one say nothing."""
        reached = confidences[: num_accepted + 1]
        self._accepted = self._accepted * KEPT + min(num_accepted, len(reached))
        self._expected = self._expected * KEPT + sum(reached)

    def skip(self, steps: int) -> None:
        """Let what was observed fade over steps without drafts."""
        self._accepted *= KEPT_UNUSED**steps
        self._expected *= KEPT_UNUSED**steps

    def gains(self, confidences: Sequence[float]) -> list[float]:
        """For each drafted token, the chance that it and all before it are right: the output tokens it is worth."""
        chance, gains = 1.0, []
        for confidence in confidences:
            chance *= min(1.0, self.rate * confidence)
            gains.append(chance)
        return gains
