"""Process groups of one replica, taken from DeepSpeed's own device meshes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.collectives import Collectives
from ulysses_infer.parallel.layout import Layout, Mode, Place

MESH_NAMES = ("data_parallel", "tensor_parallel", "sequence_parallel")


@dataclass(frozen=True)
class Groups:
    """This rank's view of the replica: its shard for life and the collectives of every loaded mode."""

    layout: Layout
    rank: int
    world: Any = None
    control: Any = None  # small host-side messages (step plans); gloo even where tensors travel by NCCL
    by_mode: dict[Mode, Collectives] = field(default_factory=dict)

    @property
    def shard(self) -> int:
        """The head shard this rank owns for life."""
        return self.layout.shard_of(self.rank)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that decides."""
        return self.rank == 0

    @property
    def shard_order(self) -> list[int]:
        """Ranks in the order of the head shards they own."""
        return [self.layout.rank_of(shard) for shard in range(self.layout.world_size)]

    def place(self, mode: Mode) -> Place:
        """This rank's part in `mode`."""
        return self.layout.place(mode, self.shard)


def init_distributed(device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group the launcher's environment describes, through DeepSpeed. Safe to call again."""
    if device.type == "cpu":
        # Read by DeepSpeed at import: without it every process probes for accelerators and warns.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.comm as comm

    if comm.is_initialized():
        return
    if device.type == "cpu":
        # DeepSpeed would compile its shared-memory op on first use (a minute, and a stale lock if killed);
        # its all-reduce ignores groups, so the engine never calls it. This is DeepSpeed's own switch table.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if device.type == "cpu" else "nccl"
    comm.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)


def build_groups(layout: Layout, modes: list[Mode], device: torch.device) -> Groups:
    """Create the groups of every mode. Collective: all ranks call it with the same arguments.

    Raises `ConfigError` when the job has another number of ranks than the layout.
    """
    if layout.world_size == 1:
        single = Groups(layout, rank=0)
        single.by_mode[Mode(1, 1)] = Collectives(single.place(Mode(1, 1)), None, None)
        return single
    import deepspeed.comm as comm

    _check_world_size(layout, comm.get_world_size())
    control = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=365))
    groups = Groups(layout, comm.get_rank(), comm.get_world_group(), control)
    for mode in modes:
        sp_group, tp_group = _mode_groups(layout, mode, groups.shard)
        groups.by_mode[mode] = Collectives(groups.place(mode), sp_group, tp_group)
    return groups


def _check_world_size(layout: Layout, world_size: int) -> None:
    if layout.world_size != world_size:
        sp, tp = layout.base
        raise ConfigError(
            f"parallel.sp * parallel.tp = {sp} * {tp} = {layout.world_size}, but the job has {world_size} ranks; "
            f"start {layout.world_size} ranks (deepspeed --num_gpus {layout.world_size}) or change parallel.sp/tp"
        )


def _mode_groups(layout: Layout, mode: Mode, shard: int) -> tuple[Any, Any]:
    """The SP and TP group of `shard` in `mode`; None for a group of one."""
    if layout.rank_order == "sp_inner":
        return _mesh_groups(mode)
    sp_groups = {tuple(layout.sp_group(mode, g)) for g in range(layout.world_size)}
    tp_groups = {tuple(layout.tp_group(mode, g)) for g in range(layout.world_size)}
    sp_group = _own_group(sp_groups, layout.rank_of(shard)) if mode.sp > 1 else None
    tp_group = _own_group(tp_groups, layout.rank_of(shard)) if mode.tp > 1 else None
    return sp_group, tp_group


def _mesh_groups(mode: Mode) -> tuple[Any, Any]:
    """With SP innermost a DeepSpeed mesh of (dp, tp, sp) is the layout of the mode, in the same order."""
    import deepspeed.comm as comm

    mesh = comm.initialize_mesh_device((1, mode.tp, mode.sp), MESH_NAMES)
    sp_group = mesh.get_group("sequence_parallel") if mode.sp > 1 else None
    tp_group = mesh.get_group("tensor_parallel") if mode.tp > 1 else None
    return sp_group, tp_group


def _own_group(members: set[tuple[int, ...]], rank: int) -> Any:
    """Create every group on every rank, in one agreed order, and keep the one this rank is in.

    Torch orders a group by rank. SP members ascend with their shard in both rank orders, so the all-to-all is
    in shard order; TP members may not, but they only sum.
    """
    import deepspeed.comm as comm

    mine = None
    for ranks in sorted(members):
        group = comm.new_group(sorted(ranks))
        if rank in ranks:
            mine = group
    return mine
