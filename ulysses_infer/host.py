"""This host: its identity, and how its ranks share its cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def host_identity() -> str:
    """A name for this host that no other host, container or process namespace has: boot id and process namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot_id}/{os.stat('/proc/self/ns/pid').st_ino}"


def ranks_on_this_host(world_size: int) -> int:
    """Ranks that the launcher started on this host: torchrun's LOCAL_WORLD_SIZE, DeepSpeed's LOCAL_SIZE, else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)


class SharedCores(NamedTuple):
    """Cores and the ranks that run on them."""

    cores: int
    ranks: int

    @property
    def threads_per_rank(self) -> int:
        """Each rank's share of the cores."""
        return max(1, self.cores // self.ranks)

    def crowding(self, threads: int) -> str:
        """What the start reports if the ranks, with `threads` each, outnumber the cores; else empty."""
        if self.ranks == 1 or self.ranks * threads <= self.cores:
            return ""
        of_threads = f" of {threads} threads" if threads > 1 else ""
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"{self.ranks} ranks{of_threads} on {cores}: waits yield early"


def shared_cores(
    own: frozenset[int], cores_of_ranks: Sequence[frozenset[int]], ranks_on_host: int, quota: float | None
) -> SharedCores:
    """The cores that a rank shares, and with how many ranks.

    own: the cores that it may use. cores_of_ranks: those of the ranks of its replica on this host, itself included. If
    all are equal, the cores are shared by all ranks of the host; otherwise something has assigned cores to ranks.
    quota: the limit of the control group, in cores.
    """
    cores = own.union(*(others for others in cores_of_ranks if others & own))
    ranks = sum(bool(others & own) for others in cores_of_ranks)
    if all(others == own for others in cores_of_ranks):
        ranks = max(ranks, ranks_on_host)
    return SharedCores(len(cores) if quota is None else max(1, min(len(cores), int(quota))), max(1, ranks))


def cpu_quota(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """The least limit of processor time in this process's control group and those above it, in cores; None: no limit.

    It limits how much runs at a time, as `docker run --cpus` does, without excluding any core.
    """
    limits = [limit for folder in _cgroup_folders(cgroups, membership) if (limit := _limit_of(folder)) is not None]
    return min(limits, default=None)


def _cgroup_folders(cgroups: Path, membership: Path) -> list[Path]:
    folders: list[Path] = []
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root = cgroups
        elif "cpu" in controllers.split(","):
            root = cgroups / controllers
            root = root if root.is_dir() else cgroups / "cpu"
        else:
            continue
        own = root / path.strip("/")
        folders += [root, *(folder for folder in (own, *own.parents) if root in folder.parents)]
    return folders


def _limit_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):  # the file belongs to another version, or is not visible in this container
        return None
