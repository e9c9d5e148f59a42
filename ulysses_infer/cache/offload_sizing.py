"""Divides the bytes of a tier below the cache among its pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ulysses_infer.config import CacheConfig
from ulysses_infer.errors import ConfigError

HOST, DISK = "offload_host_bytes", "offload_disk_bytes"
"""Keys of the sizes, in `cache`."""


class OffloadSizes(NamedTuple):
    """Slots of a tier on each rank: one number per cache group and, last, for snapshots of recurrent states if any."""

    host_slots: tuple[int, ...]
    disk_slots: tuple[int, ...]
    slot_bytes: tuple[int, ...]

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the slots take."""
        return self._bytes(self.host_slots)

    @property
    def disk_bytes(self) -> int:
        """Bytes of disk space that the slots take."""
        return self._bytes(self.disk_slots)

    def _bytes(self, slots: Sequence[int]) -> int:
        return sum(count * size for count, size in zip(slots, self.slot_bytes, strict=True))


def offload_sizes(config: CacheConfig, slot_bytes: Sequence[int], counts: Sequence[int]) -> OffloadSizes:
    """The slots of the tier that `config` asks for.

    slot_bytes: of a block of each cache group on this rank, and last of a snapshot; counts: how many of each the cache
    has. Raises `ConfigError` if one of each does not fit.
    """
    host = _slots(HOST, config.offload_host_bytes, slot_bytes, counts)
    disk = _slots(DISK, config.offload_disk_bytes, slot_bytes, counts) if config.offload_disk_bytes else [0] * len(host)
    return OffloadSizes(tuple(host), tuple(disk), tuple(slot_bytes))


def _slots(key: str, num_bytes: int, slot_bytes: Sequence[int], counts: Sequence[int]) -> list[int]:
    """At least one slot in each pool, and the rest in the proportions of the cache."""
    least, whole = sum(slot_bytes), sum(count * size for count, size in zip(counts, slot_bytes, strict=True))
    if num_bytes < least:
        raise ConfigError(
            f"cache.{key} = {num_bytes} is less than one block of every cache group takes on a rank, {least} bytes; "
            "raise it, or set it to 0"
        )
    return [1 + (num_bytes - least) * count // max(1, whole) for count in counts]
