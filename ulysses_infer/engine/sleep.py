"""Sleep: which memory the engine has freed, and which calls are refused meanwhile."""

from __future__ import annotations

from ulysses_infer.errors import RequestError

CACHE, CACHE_AND_WEIGHTS = 1, 2  # levels of `sleep`


class SleepState:
    """The state of rank 0; the memory itself is freed by every rank (`job/weights.py`)."""

    def __init__(self) -> None:
        self.level = 0
        """0: awake; 1: the cache is freed; 2: the weights too."""
        self.lacks_weights = False

    def check_awake(self) -> None:
        """Raise `RequestError` unless requests can run."""
        if self.level:
            raise RequestError("the engine is asleep; call wake_up() first")
        if self.lacks_weights:
            raise RequestError("the weights were freed by sleep(level=2); call update_weights() first")

    def deepen(self, level: int) -> None:
        """Fall asleep, or into a deeper level of sleep. Raises `RequestError` for an unknown level."""
        if level not in (CACHE, CACHE_AND_WEIGHTS):
            raise RequestError(f"sleep level is {level!r}; use 1 (cache) or 2 (cache and weights)")
        self.level = max(self.level, level)
        self.lacks_weights |= level == CACHE_AND_WEIGHTS
