"""The memory of a tier below the cache on one rank: host memory, and a file on disk that no other process can open."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ulysses_infer.cache.offload_sizing import DISK, HOST, OffloadSizes
from ulysses_infer.errors import ConfigError


class OffloadMemory:
    """host[pool], disk[pool]: [slots, bytes of a slot] uint8.

    Pages are allocated when slots are first used, unless host memory is pinned. Space on disk is reserved at once. The
    file has no name: nothing of it remains when the process ends, however it ends.
    """

    def __init__(self, sizes: OffloadSizes, folder: str | None, pins: bool) -> None:
        """folder: of the file, None without slots on disk; pins: for copies by a GPU. Call `take` before use."""
        self.sizes, self._folder, self._pins = sizes, folder, pins
        self.host: list[torch.Tensor] = []
        self.disk: list[torch.Tensor] = []
        self._pinned: torch.Tensor | None = None

    def take(self) -> None:
        """Allocate the memory; its content is undefined. Raises `ConfigError`, and has none, if there is not enough."""
        try:
            self._take()
        except ConfigError:
            self.release()
            raise

    def _take(self) -> None:
        memory = _host_memory(self.sizes.host_bytes)
        if self._pins:
            _pin(memory)
            self._pinned = memory
        self.host = _split(memory, self.sizes.host_slots, self.sizes.slot_bytes)
        if self._folder is not None:
            on_disk = _disk_memory(self.sizes.disk_bytes, self._folder)
            self.disk = _split(on_disk, self.sizes.disk_slots, self.sizes.slot_bytes)

    def release(self) -> None:
        """Free the memory, until `take`. No copy may be in progress."""
        if self._pinned is not None:
            _check(torch.cuda.cudart().cudaHostUnregister(self._pinned.data_ptr()), "unpinning")
        self.host, self.disk, self._pinned = [], [], None


def _split(memory: torch.Tensor, slots: Sequence[int], slot_bytes: Sequence[int]) -> list[torch.Tensor]:
    parts = memory.split([count * size for count, size in zip(slots, slot_bytes, strict=True)])
    return [part.view(count, size) for part, count, size in zip(parts, slots, slot_bytes, strict=True)]


def _host_memory(num_bytes: int) -> torch.Tensor:
    """Zeros: [num_bytes] uint8, returned to the system when the tensor ends, whatever the heap keeps."""
    try:
        return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"cache.{HOST}: {num_bytes} bytes of host memory cannot be taken ({error})") from error


def _disk_memory(num_bytes: int, folder: str) -> torch.Tensor:
    """[num_bytes] uint8 in a file without a name in `folder`."""
    key = "cache.offload_disk_folder"
    if not Path(folder).is_dir():
        raise ConfigError(f"{key} = {folder!r} is not a folder; make it, or give another")
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed below
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{key} = {folder!r}: no file can be made there ({reason}); give another") from error
    with file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return torch.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=torch.uint8)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(
                f"cache.{DISK}: {num_bytes} bytes cannot be reserved in {folder!r} ({reason}); lower it or give "
                "another folder"
            ) from error


def _pin(memory: torch.Tensor) -> None:
    """Pin pages for a GPU. torch's own pinned memory would round the size up to a power of two."""
    _check(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0), "pinning")


def _check(status: int, doing: str) -> None:
    if int(status):
        raise ConfigError(
            f"cache.{HOST}: {doing} host memory failed with CUDA error {int(status)}; lower it, or raise the limit of "
            "locked memory (ulimit -l)"
        )
