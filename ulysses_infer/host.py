"""This host: its identity, and how many ranks share it."""

from __future__ import annotations

import os
from pathlib import Path


def host_identity() -> str:
    """A name for this host that no other host, container or process namespace has: boot id and process namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot_id}/{os.stat('/proc/self/ns/pid').st_ino}"


def ranks_on_this_host(world_size: int) -> int:
    """Ranks that the launcher started on this host: torchrun's LOCAL_WORLD_SIZE, DeepSpeed's LOCAL_SIZE, else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
