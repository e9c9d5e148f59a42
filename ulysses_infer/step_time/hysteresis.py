"""Switch hysteresis: when a faster mode is worth the change to it."""

from __future__ import annotations

from collections.abc import Mapping

from ulysses_infer.parallel.layout import Mode


class SwitchHysteresis:
    """Leaves a mode once staying in it has lost as much time as a switch costs, and at once if a switch costs nothing.

    So switches and delays together never cost more than about twice the best plan in hindsight. Source: the ski-rental
    rule; Karlin, Manasse, Rudolph and Sleator, "Competitive snoopy caching", 1988.
    """

    def __init__(self, cost: float = 0.0) -> None:
        self.cost = cost
        """Seconds that a change of mode adds to the next step."""
        self._current: Mode | None = None
        self._lost: dict[Mode, float] = {}

    def choose(self, times: Mapping[Mode, float]) -> Mode:
        """The mode of the next step, given its predicted seconds in each."""
        best = min(times, key=times.__getitem__)
        if self._current is None or self.cost <= 0:
            return self._change(best)
        own = times[self._current]
        for mode, seconds in times.items():
            self._lost[mode] = max(0.0, self._lost.get(mode, 0.0) + own - seconds)
        if times[best] < own and self._lost[best] >= self.cost:
            return self._change(best)
        return self._current

    def _change(self, mode: Mode) -> Mode:
        self._current = mode
        self._lost.clear()
        return mode
