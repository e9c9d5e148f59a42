"""What rank 0 knows of memory that the engine has given back."""

from __future__ import annotations

from ulysses_infer.errors import RequestError

CACHE, WEIGHTS_TOO = 1, 2  # what `sleep` gives back


class SleepState:
    """What rank 0 knows of memory given back, and which calls have to wait for it."""

    def __init__(self) -> None:
        self.level = 0
        """0: awake; 1: the cache is given back; 2: the weights were, too."""
        self.lacks_weights = False

    def check_awake(self) -> None:
        """Raise `RequestError` unless requests can run."""
        if self.level:
            raise RequestError("the engine is asleep; call wake_up() first")
        if self.lacks_weights:
            raise RequestError("the engine gave its weights back with sleep(level=2); call update_weights() first")

    def deepen(self, level: int) -> None:
        """Fall asleep, or asleep deeper."""
        if level not in (CACHE, WEIGHTS_TOO):
            raise RequestError(f"sleep level is {level!r}; use 1 (the cache) or 2 (the weights, too)")
        self.level = max(self.level, level)
        self.lacks_weights |= level == WEIGHTS_TOO
