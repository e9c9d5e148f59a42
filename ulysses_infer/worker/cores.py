"""Core pinning: every rank of a host gets its own processor cores, so that ranks in a collective never share one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

SYSTEM = Path("/sys/devices/system")
CoreLocation = tuple[int, int, int]
"""(NUMA node, physical core, number); neighbours in this order share the most hardware."""


class PinnedCores:
    """Pins the calling thread, and every thread it starts, to `cores` until `release`."""

    def __init__(self, cores: Iterable[int]) -> None:
        self._before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, set(cores))

    def release(self) -> None:
        """Restore the affinity from before. Safe to call again."""
        os.sched_setaffinity(0, self._before)


def share_of(allowed: Sequence[int], index: int, count: int, location: Callable[[int], CoreLocation]) -> list[int]:
    """The cores of rank `index` of `count` on a host: equal runs of neighbours. A remainder stays unused."""
    ordered = sorted(allowed, key=location)
    size = len(ordered) // count
    return ordered[index * size : (index + 1) * size]


def pin(index: int, count: int, threads: int, cores_of_ranks: Sequence[frozenset[int]]) -> PinnedCores | None:
    """Pin rank `index` of `count` on this host; None if there are too few cores for its threads.

    cores_of_ranks: the cores that each rank may use now. If they differ, or are fewer than the machine's, something
    else has assigned cores already, and nothing is changed.
    """
    allowed = os.sched_getaffinity(0)
    if any(other != allowed for other in cores_of_ranks) or len(allowed) != os.cpu_count():
        return None
    if len(allowed) // count < threads:
        return None
    return PinnedCores(share_of(sorted(allowed), index, count, core_location))


def core_location(core: int) -> CoreLocation:
    """The location of a core; (0, core, core) if the system does not say."""
    folder = SYSTEM / "cpu" / f"cpu{core}"
    nodes = [int(match[1]) for path in folder.glob("node*") if (match := re.fullmatch(r"node(\d+)", path.name))]
    physical = folder / "topology" / "core_id"
    return min(nodes, default=0), int(physical.read_text()) if physical.is_file() else core, core
