"""Brings up one rank's part of the tier of host memory and disk below the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ulysses_infer.cache.budget import GIB, MemoryBudget, available_memory
from ulysses_infer.cache.offload_memory import OffloadMemory
from ulysses_infer.cache.offload_sizing import HOST, OffloadSizes, offload_sizes
from ulysses_infer.config import Config
from ulysses_infer.errors import ConfigError
from ulysses_infer.job.make_worker import cache_sizing
from ulysses_infer.model.model import ShiftModel
from ulysses_infer.parallel.groups import ProcessGroups
from ulysses_infer.worker.channel import Channel
from ulysses_infer.worker.drafting.head_drafter import HeadDrafter
from ulysses_infer.worker.offload.block_rows import BlockRows
from ulysses_infer.worker.offload.copies import make_copies, staging_bytes
from ulysses_infer.worker.offload.mover import BlockMover
from ulysses_infer.worker.worker import Worker


def make_offload(config: Config, worker: Worker, channel: Channel) -> BlockMover | None:
    """The tier that the recipe asks for, with its memory; None if it asks for none. Collective.

    Raises `ConfigError`, on all ranks alike.
    """
    if not config.cache.offload_host_bytes:
        return None
    sizes = channel.together(lambda: sizes_of(config, worker))
    host_slots, disk_slots = (tuple(map(channel.smallest, counts)) for counts in (sizes.host_slots, sizes.disk_slots))
    folder = config.cache.offload_disk_folder if config.cache.offload_disk_bytes else None
    memory = OffloadMemory(
        OffloadSizes(host_slots, disk_slots, sizes.slot_bytes), folder, pins=worker.device.type == "cuda"
    )
    mover = BlockMover(lambda: tensors_of(worker), memory, lambda rows: make_copies(worker.device, rows))
    channel.together(mover.take)
    return mover


def sizes_of(config: Config, worker: Worker) -> OffloadSizes:
    """The slots of the tier on this rank. Raises `ConfigError`."""
    states, counts = worker.states, list(worker.cache.blocks_of_groups)
    if states is not None:
        if not states.num_snapshots:
            raise ConfigError(
                f"cache.{HOST} = {config.cache.offload_host_bytes}: model type "
                f"{worker.model.injection.config.model_type!r} has recurrent states, and without snapshots of them "
                "(cache.state_snapshots) no prefix is reused; use 0"
            )
        counts.append(states.num_snapshots)
    return offload_sizes(config.cache, [BlockRows(each).num_bytes for each in tensors_of(worker)], counts)


def tensors_of(worker: Worker) -> list[Sequence[torch.Tensor]]:
    """The tensors of each pool: cache groups, those of a draft head with the first, and last the recurrent states."""
    cache, drafter = worker.cache, worker.drafter
    pools: list[Sequence[torch.Tensor]] = [
        cache.tensors_of_group(group) for group in range(len(cache.groups.attention_spans))
    ]
    if isinstance(drafter, HeadDrafter):
        pools[0] = [*pools[0], *drafter.cache.tensors_of_group(0)]
    if worker.states is not None:
        pools.append([worker.states.memory])
    return pools


def without_offload(
    budget: MemoryBudget, config: Config, model: ShiftModel, groups: ProcessGroups, device: torch.device, ranks: int
) -> MemoryBudget:
    """What the tier leaves of `budget`. ranks: on this host. Raises `ConfigError` if host memory does not suffice."""
    wanted = config.cache.offload_host_bytes
    if not wanted:
        return budget
    on_cpu = device.type == "cpu"
    if device.type != "meta":
        _check_fits(wanted, budget, on_cpu, config.cache.memory_utilization, ranks)
    sizing = cache_sizing(config, model, groups)
    blocks = [sizing.shape.bytes_of_group(sizing.groups, group) for group in range(len(sizing.groups.attention_spans))]
    return dataclasses.replace(budget, offload=wanted if on_cpu else staging_bytes(blocks))


def _check_fits(wanted: int, budget: MemoryBudget, on_cpu: bool, utilization: float, ranks: int) -> None:
    left = budget.left if on_cpu else available_memory(torch.device("cpu"), utilization, ranks)
    if wanted > left:
        of = f" ({budget})" if on_cpu else ""
        raise ConfigError(
            f"cache.{HOST} {wanted} takes {wanted / GIB:.2f} GiB, but {max(left, 0) / GIB:.2f} GiB of host memory are "
            f"left per rank{of}; lower it"
        )
