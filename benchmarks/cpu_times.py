"""CPU times of calls, which other programs on the machine hardly change."""

from __future__ import annotations

import time
from collections.abc import Callable


def least_cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """The least CPU time of `repeats` calls, summed over the threads of this process."""
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return min(taken)
