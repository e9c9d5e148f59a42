"""How many of a request's drafted tokens are right, observed while it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

PRIOR = 0.7  # before anything was verified
PRIOR_WEIGHT = 1.0  # tokens that it counts as
LEAST_UNTRIED = 0.3  # of a request whose drafts were not verified lately, however few tokens of others are right
TRIED = 0.5  # verified tokens from which on a request's own drafts count
KEPT = 0.97  # of what was observed of a request, per verified draft
KEPT_OF_ALL = 0.998  # the same of all requests
KEPT_UNUSED = 0.99  # per step without drafts: a request that stopped drafting tries again at last
WEIGHTS = (1.0, 4.0, 16.0, 64.0)  # tokens that the rate of all requests may count as in that of one
KEPT_SCORE = 0.99  # of how well each weight has predicted, per verified draft
NEVER = 0.02  # chances closer to 0 or 1 are not predicted


class SharedAcceptance:
    """The rate of all requests, and how much it says about one of them.

    Requests that are alike tell more about each other than the few drafts of one of them do; requests of different
    kinds do not. So each weight of the common rate is judged by how well it would have predicted what was accepted.
    Source: empirical Bayes estimation, Efron and Morris, 1973.
    """

    def __init__(self) -> None:
        self._accepted, self._expected = PRIOR * PRIOR_WEIGHT, PRIOR_WEIGHT
        self._scores = [0.0] * len(WEIGHTS)
        self.weight = WEIGHTS[0]
        """Tokens that the common rate counts as in that of a request."""

    @property
    def rate(self) -> float:
        """The share of right tokens, relative to the proposer's confidences."""
        return self._accepted / self._expected

    def observe(self, accepted: float, expected: float) -> None:
        """Learn from a verified draft."""
        self._accepted = self._accepted * KEPT_OF_ALL + accepted
        self._expected = self._expected * KEPT_OF_ALL + expected

    def judge(self, reached: Sequence[float], num_accepted: int, own: tuple[float, float]) -> None:
        """Compare what each weight would have predicted of a draft. reached: the confidences of the tokens up to the
        first wrong one; own: (accepted, expected) of the request before it."""
        for place, weight in enumerate(WEIGHTS):
            rate = (own[0] + self.rate * weight) / (own[1] + weight)
            score = 0.0
            for number, confidence in enumerate(reached):
                chance = min(max(rate * confidence, NEVER), 1 - NEVER)
                score += math.log(chance if number < num_accepted else 1 - chance)
            self._scores[place] = self._scores[place] * KEPT_SCORE + score
        self.weight = WEIGHTS[max(range(len(WEIGHTS)), key=self._scores.__getitem__)]


class Acceptance:
    """The rate at which a request's drafted tokens are accepted, relative to the proposer's confidence."""

    def __init__(self, shared: SharedAcceptance | None = None) -> None:
        """shared: of all requests."""
        self._shared = shared or SharedAcceptance()
        self._accepted = 0.0
        self._expected = 0.0

    @property
    def rate(self) -> float:
        """The chance, 0 to 1, that a token drafted with confidence 1 is right if those before it are."""
        usual, weight = self._shared.rate, self._shared.weight
        if self._expected < TRIED:
            usual = max(usual, LEAST_UNTRIED)
        return (self._accepted + usual * weight) / (self._expected + weight)

    def observe(self, confidences: Sequence[float], num_accepted: int) -> None:
        """Learn from a verified draft. Tokens after the first wrong one say nothing."""
        reached = confidences[: num_accepted + 1]
        accepted, expected = min(num_accepted, len(reached)), sum(reached)
        self._shared.judge(reached, num_accepted, (self._accepted, self._expected))
        self._learn(accepted, expected)

    def expect(self, chance: float) -> None:
        """Learn from a draft that was not verified. chance: that its first token is right, by its confidence."""
        self._learn(chance, 1.0)

    def _learn(self, accepted: float, expected: float) -> None:
        self._shared.observe(accepted, expected)
        self._accepted = self._accepted * KEPT + accepted
        self._expected = self._expected * KEPT + expected

    def skip(self, steps: int) -> None:
        """Let what was observed fade over steps without drafts."""
        self._accepted *= KEPT_UNUSED**steps
        self._expected *= KEPT_UNUSED**steps

    def gains(self, confidences: Sequence[float]) -> list[float]:
        """For each drafted token, the chance that it and all before it are right: the output tokens it is worth."""
        rate, chance, gains = self.rate, 1.0, []
        for confidence in confidences:
            chance *= min(1.0, rate * confidence)
            gains.append(chance)
        return gains
