"""Processor cores: every rank of a host keeps to its own, so that ranks that wait for each other never share one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

SYSTEM = Path("/sys/devices/system")
CoreAssignment = tuple[int, int, int]
"""(NUMA node, physical core, number): neighbours in this order share the most."""


class PinnedCores:
    """The calling thread on `cores`, and with it every thread that it starts, until `release`."""

    def __init__(self, cores: Iterable[int]) -> None:
        self._before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, set(cores))

    def release(self) -> None:
        """Let the calling thread run anywhere it could before. Safe to call again."""
        os.sched_setaffinity(0, self._before)


def share_of(allowed: Sequence[int], index: int, count: int, place: Callable[[int], CoreAssignment]) -> list[int]:
    """The cores of rank `index` of `count` on a host: equal runs of neighbours; what does not divide is left over."""
    ordered = sorted(allowed, key=place)
    size = len(ordered) // count
    return ordered[index * size : (index + 1) * size]


def pin(index: int, count: int, threads: int, everyone: Sequence[frozenset[int]]) -> PinnedCores | None:
    """Keep rank `index` of `count` on this host to its cores; None if they do not suffice for its threads.

    `everyone`: the cores that each rank may use so far. Where they differ, or are fewer than the machine's, somebody
    else has distributed them, and nothing is changed.
    """
    allowed = os.sched_getaffinity(0)
    if any(other != allowed for other in everyone) or len(allowed) != os.cpu_count():
        return None
    if len(allowed) // count < threads:
        return None
    return PinnedCores(share_of(sorted(allowed), index, count, core_place))


def core_place(core: int) -> CoreAssignment:
    """Where a core is; all in one place where the system does not say."""
    folder = SYSTEM / "cpu" / f"cpu{core}"
    nodes = [int(match[1]) for path in folder.glob("node*") if (match := re.fullmatch(r"node(\d+)", path.name))]
    physical = folder / "topology" / "core_id"
    return min(nodes, default=0), int(physical.read_text()) if physical.is_file() else core, core
