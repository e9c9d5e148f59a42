"""Measures how many cores other programs use: benchmarks on a busy machine are unreliable."""

from __future__ import annotations

import time

import psutil

from ulysses_infer.job.processes import is_launched


class LoadMeter:
    """Average number of cores that processes outside this job have used since it was created."""

    def __init__(self) -> None:
        self._started, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    def foreign_cores(self) -> float:
        """Busy cores of other processes."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        foreign = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        return max(0.0, foreign / elapsed)


def _busy_seconds() -> float:
    """Processor seconds of the whole machine since boot, without idle time."""
    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(times, name, 0.0) for name in names)


def _own_seconds() -> float:
    """Processor seconds of this job: the launcher's whole process tree, or this process and its children, also those
    that have ended."""
    own = psutil.Process()
    launcher = own.parent() if is_launched() else None
    root = launcher if launcher is not None else own
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total
