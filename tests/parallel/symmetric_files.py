"""Symmetric memory for ranks without GPUs: files that all ranks map."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch

from ulysses_infer.parallel.symmetric_memory import SymmetricMemory


class FileAllocator:
    """An `Allocator` whose memory is in files of `folder`. `fails`: what this rank fails at, and how."""

    def __init__(self, folder: str, fails: dict[str, str] | None = None) -> None:
        self._folder, self._fails, self._numbers = Path(folder), fails or {}, itertools.count()
        self._files: dict[int, str] = {}
        self.met: list[str] = []

    def obstacle(self, device: torch.device) -> str:
        return self._fails.get("obstacle", "")

    def reserve(self, size: int, device: torch.device) -> torch.Tensor:
        if "reserve" in self._fails:
            raise RuntimeError(self._fails["reserve"])
        file = str(self._folder / f"{os.environ['RANK']}-{os.getpid()}-{id(self)}-{next(self._numbers)}")
        local = torch.from_file(file, shared=True, size=size, dtype=torch.uint8)
        self._files[local.data_ptr()] = file
        return local.zero_()

    def meet(self, local: torch.Tensor, process_group: Any) -> SymmetricMemory:
        ranks, mine = torch.distributed.get_world_size(process_group), torch.distributed.get_rank(process_group)
        files: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(files, self._files[local.data_ptr()], group=process_group)
        if "meet" in self._fails:
            raise RuntimeError(self._fails["meet"])
        peers = [
            local if rank == mine else torch.from_file(file, shared=True, size=len(local), dtype=torch.uint8)
            for rank, file in enumerate(files)
        ]
        if "write" in self._fails:
            peers[(mine + 1) % ranks] = torch.zeros_like(local)  # writes to that peer go nowhere
        self.met.append(process_group.group_name)
        return SymmetricMemory(local, [each.data_ptr() for each in peers], mine, process_group.group_name, False, peers)
