"""Ray actors beside OpenRLHF's engine actor, one for each further rank of the engine.

They hold the rank's share of a GPU, and are the rank in the trainer's group of `ray.util.collective`, which counts
tensor-parallel ranks.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import torch

from ulysses_infer.errors import ConfigError

DEVICES = "CUDA_VISIBLE_DEVICES"


class Seat:
    """The place of one rank. Its process uses no device until it joins a group."""

    def place(self) -> tuple[str, list[str]]:
        """The node, and the GPUs that Ray has given."""
        return place()

    def join(self, world_size: int, rank: int, backend: str, group_name: str) -> None:
        """Join the trainer's group. Its GPU is the only one that this process sees."""
        from ray.util import collective

        _, gpus = place()
        if gpus:
            os.environ[DEVICES] = ",".join(gpus)
        collective.init_collective_group(world_size, rank, backend, group_name)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, group_name: str) -> None:
        """Take part in one broadcast of the trainer. The engine actor has the tensor as well; this one is dropped."""
        from ray.util import collective

        collective.broadcast(torch.empty(shape, dtype=dtype, device=device), 0, group_name)


class Seats:
    """The seats of an engine, in the order of its ranks after the first. actors: of `Seat`."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)

    async def devices(self) -> dict[str, str]:
        """The variable that selects the GPUs of all ranks of the engine; empty on CPUs.

        Raises `ConfigError` if they are on several nodes.
        """
        import ray

        own = place() if ray.is_initialized() else ("", [])
        places = [own, *await asyncio.gather(*(actor.place.remote() for actor in self._actors))]
        if len({node for node, _ in places}) > 1:
            raise ConfigError(
                f"the {len(places)} ranks of an engine are on several nodes; use fewer, whose GPUs are on one"
            )
        gpus = [gpu for _, found in places for gpu in found]
        return {DEVICES: ",".join(gpus)} if gpus else {}

    def join(self, world_size: int, first_rank: int, backend: str, group_name: str) -> list[Any]:
        """Start to join a group, as ranks from `first_rank` on; returns what to await."""
        ranks = enumerate(self._actors, start=first_rank)
        return [actor.join.remote(world_size, rank, backend, group_name) for rank, actor in ranks]

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, group_name: str) -> list[Any]:
        """Start to take part in a broadcast; returns what to await."""
        return [actor.receive.remote(shape, dtype, device, group_name) for actor in self._actors]

    def __len__(self) -> int:
        return len(self._actors)


def place() -> tuple[str, list[str]]:
    """The node of this process, and the GPUs that Ray has given it."""
    import ray

    context = ray.get_runtime_context()
    return context.get_node_id(), list(context.get_accelerator_ids().get("GPU", []))
