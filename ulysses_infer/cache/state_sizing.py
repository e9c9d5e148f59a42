"""Divides a rank's cache memory between the states of recurrent layers and the blocks of keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_infer.errors import ConfigError

SNAPSHOTS_PER_SEQUENCE = 4  # at most, unless the recipe says how many
SNAPSHOT_SHARE = 8  # snapshots take at most 1/8 of the cache, unless the recipe says how many


@dataclass(frozen=True)
class StateSizing:
    """Computes how many slots of states a rank gets."""

    num_bytes_per_slot: int
    max_num_seqs: int
    num_snapshots: int | None
    """None: as many as a part of the memory holds."""
    scratch_slots: int = 0

    def num_bytes(self, num_sequences: int, num_snapshots: int) -> int:
        """Bytes of slots for running sequences and snapshots, scratch slots included."""
        return (num_sequences + num_snapshots + self.scratch_slots) * self.num_bytes_per_slot

    def slots_within(self, num_bytes: int, request_bytes: int) -> tuple[int, int]:
        """(slots of running sequences, snapshots) of a cache of `num_bytes` that also holds the blocks of at least one
        request, `request_bytes`.

        At most half of the cache serves states, as long as that is enough for one request. Raises `ConfigError` if even
        one does not fit.
        """
        wanted = self.num_snapshots or 0
        least = self.num_bytes(1, wanted)
        if least + request_bytes > num_bytes:
            raise ConfigError(self._too_small(num_bytes, request_bytes))
        half = num_bytes // 2 if request_bytes else num_bytes
        room = min(max(half, least), num_bytes - request_bytes) - self.num_bytes(0, wanted)
        num_sequences = min(self.max_num_seqs, room // self.num_bytes_per_slot)
        if self.num_snapshots is not None:
            return num_sequences, wanted
        rest = min(room - num_sequences * self.num_bytes_per_slot, num_bytes // SNAPSHOT_SHARE)
        return num_sequences, min(SNAPSHOTS_PER_SEQUENCE * num_sequences, rest // self.num_bytes_per_slot)

    def _too_small(self, num_bytes: int, request_bytes: int) -> str:
        wanted = self.num_snapshots or 0
        snapshots = f" and {wanted} snapshots" if wanted else ""
        needed = self.num_bytes(1, wanted) + request_bytes
        remedy = "lower cache.state_snapshots, or " if wanted else ""
        return (
            f"the cache has {num_bytes} bytes, but one request{snapshots} needs {needed} ({self.num_bytes_per_slot} "
            f"for recurrent states, {request_bytes} for keys and values); {remedy}use more ranks, raise "
            "cache.memory_bytes or lower model.max_model_len"
        )
