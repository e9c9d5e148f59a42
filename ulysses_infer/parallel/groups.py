"""All process groups of one replica, taken from DeepSpeed's device meshes."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.collectives import CollectiveClock, Collectives
from ulysses_infer.parallel.group import Group, Mailbox
from ulysses_infer.parallel.layout import Layout, Mode, Place
from ulysses_infer.parallel.shared_memory import SharedMemory, SharedMemoryUnavailableError, share_memory
from ulysses_infer.parallel.torch_group import TorchGroup, TorchMailbox

logger = logging.getLogger(__name__)

MESH_NAMES = ("data_parallel", "tensor_parallel", "sequence_parallel")
FORMING_TIMEOUT = timedelta(seconds=60)  # ranks that are all there make a group in a moment, unless one is lost
START_TIMEOUT = timedelta(minutes=30)  # ranks of a job may download and load for very different times
IDLE_TIMEOUT = timedelta(days=365)  # how long the other ranks wait for rank 0 to have work


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of an engine in plain Python meet; under a launcher its environment says that."""

    store: Any
    rank: int
    world_size: int


@dataclass
class Groups:
    """This rank's view of the replica: its shard for life and the collectives of every loaded mode.

    It alone holds the groups, so that closing it closes their connections and so tells the other ranks.
    """

    layout: Layout
    rank: int
    world: Group | None = None
    mailbox: Mailbox | None = None  # for what rank 0 tells the others
    control: Any = None  # what ranks agree on now and then; gloo even where tensors travel otherwise
    by_mode: dict[Mode, Collectives] = field(default_factory=dict)
    clock: CollectiveClock = field(default_factory=CollectiveClock)  # of every mode
    owned: list[Any] = field(default_factory=list)  # every process group of this engine, the control group among them
    memory: SharedMemory | None = None  # where the groups are, if not in process groups

    def close(self) -> None:
        """Leave the groups that `build_groups` made; the job's own group stays. Not collective.

        Ranks that wait in one of them get a RuntimeError at once.
        """
        self.by_mode.clear()
        self.world = self.mailbox = self.control = None
        if self.memory is not None:
            self.memory.close()
        while self.owned:
            _leave(self.owned.pop())

    def limit_waits(self, seconds: float) -> None:
        """From now on no exchange may take longer: the rank that waits gets a RuntimeError.

        Only the other ranks' wait for rank 0's next message is not limited: an engine may be idle for days.
        """
        for group in self.owned:
            idles = group is self.control and not self.is_first
            group.set_timeout(IDLE_TIMEOUT if idles else timedelta(seconds=seconds))
        if self.memory is not None:
            self.memory.limit_waits(seconds)

    def gather_to_first(self, shard: torch.Tensor) -> torch.Tensor | None:
        """Every rank's `shard`, all of one shape, on rank 0, in the order of ranks: [W, *shape]; None elsewhere."""
        if self.layout.world_size == 1:
            return shard[None]
        assert self.world is not None
        return self.world.gather_to_first(shard)

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


def _leave(group: Any) -> None:
    import deepspeed.comm as comm

    comm.destroy_process_group(group)


def init_distributed(
    device: torch.device, timeout: timedelta = START_TIMEOUT, meet: Callable[[], Rendezvous] | None = None
) -> None:
    """Join the process group of the launcher's environment, or of `meet()`, through DeepSpeed. Safe to call again."""
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
    if meet is not None:
        met = meet()
        torch.distributed.init_process_group(
            backend,
            store=met.store,
            rank=met.rank,
            world_size=met.world_size,
            timeout=FORMING_TIMEOUT,
            device_id=None if device.type == "cpu" else device,
        )
    comm.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def build_groups(
    layout: Layout,
    modes: list[Mode],
    device: torch.device,
    num_ranks: int | None = None,
    collectives: str = "auto",
    external_group: Any = None,
) -> Groups:
    """Create the process groups of every mode. Collective: all ranks call it with the same arguments.

    `num_ranks`: the size of the job if no launcher's environment says so. `collectives`: as `runtime.collectives`.
    `external_group`: a sequence-parallel process group of the job. Modes with the same members use it, and it outlives
    the engine. Raises `ConfigError`, on every rank, if the job has another number of ranks than the layout, or if
    shared memory is asked for and not available.
    """
    if layout.world_size == 1:
        _check_world_size(layout, num_ranks or int(os.environ.get("WORLD_SIZE", "1")))
        single = Groups(layout, rank=0)
        single.by_mode[Mode(1, 1)] = Collectives(single.place(Mode(1, 1)), None, None, single.clock)
        return single
    import deepspeed.comm as comm

    _check_world_size(layout, comm.get_world_size())
    control = _new_group(range(layout.world_size), backend="gloo")
    control.set_timeout(START_TIMEOUT)
    groups = Groups(layout, comm.get_rank(), control=control, owned=[control])
    reason = _share_memory(groups, modes, device, collectives)
    if groups.is_first:
        logger.info("ranks exchange tensors %s", f"by torch: {reason}" if reason else "in memory that they share")
    if reason:
        _use_torch(groups, modes, external_group)
    return groups


def _share_memory(groups: Groups, modes: list[Mode], device: torch.device, collectives: str) -> str:
    """Have all exchanges done in shared memory, or say why not. Collective; every rank does the same."""
    if collectives == "torch":
        return "runtime.collectives = torch"
    try:
        if device.type != "cpu":
            raise SharedMemoryUnavailableError("tensors are not in the memory of a CPU")
        _use_memory(groups, modes)
    except SharedMemoryUnavailableError as error:
        if collectives == "shared_memory":
            raise ConfigError(f"runtime.collectives = shared_memory, but {error}; use auto or torch") from error
        return str(error)
    return ""


def _use_memory(groups: Groups, modes: list[Mode]) -> None:
    layout = groups.layout
    everyone = tuple(range(layout.world_size))
    members = {everyone}
    for mode, shard in itertools.product(modes, everyone):
        members |= {tuple(ranks) for ranks in _members(layout, mode, shard) if len(ranks) > 1}
    groups.memory = memory = share_memory(groups.rank, sorted(members), groups.control)
    made = {ranks: memory.group(ranks) for ranks in sorted(members)}
    groups.world, groups.mailbox = made[everyone], memory.mailbox()
    for mode in modes:
        sp_ranks, tp_ranks = _members(layout, mode, groups.shard)
        groups.by_mode[mode] = Collectives(
            groups.place(mode), made.get(tuple(sp_ranks)), made.get(tuple(tp_ranks)), groups.clock
        )


def _members(layout: Layout, mode: Mode, shard: int) -> tuple[list[int], list[int]]:
    """The SP and the TP group of a shard, in the order of their ranks. For SP that is the order of the shards too."""
    return sorted(layout.sp_group(mode, shard)), sorted(layout.tp_group(mode, shard))


def _use_torch(groups: Groups, modes: list[Mode], external_group: Any) -> None:
    # A group of our own even for all ranks: its time limits and its end are not those of the job's group.
    world = _new_group(range(groups.layout.world_size))
    groups.owned.append(world)
    groups.world, groups.mailbox = TorchGroup(world), TorchMailbox(groups.control)
    for mode in modes:
        borrowed = external_group if _is_sp_group(groups, mode, external_group) else None
        sp_group, tp_group = (group and TorchGroup(group) for group in _mode_groups(groups, mode, world, borrowed))
        groups.by_mode[mode] = Collectives(groups.place(mode), sp_group, tp_group, groups.clock)


def _new_group(ranks: Iterable[int], backend: str | None = None) -> Any:
    """Like `deepspeed.comm.new_group`, which takes no time limit. `backend` None: that of the job."""
    return torch.distributed.new_group(list(ranks), timeout=FORMING_TIMEOUT, backend=backend)


def _check_world_size(layout: Layout, world_size: int) -> None:
    if layout.world_size != world_size:
        sp, tp = layout.base
        raise ConfigError(
            f"parallel.sp * parallel.tp = {sp} * {tp} = {layout.world_size}, but the job has {world_size} ranks; "
            f"start {layout.world_size} ranks (deepspeed --num_gpus {layout.world_size}) or change parallel.sp/tp"
        )


def _is_sp_group(groups: Groups, mode: Mode, external_group: Any) -> bool:
    """Whether `external_group` is the SP group of `mode`, on every rank. Collective, unless no rank was given one."""
    if external_group is None:
        return False
    ranks = _members(groups.layout, mode, groups.shard)[0]
    found: list[bool] = [False] * groups.layout.world_size
    mine = torch.distributed.get_process_group_ranks(external_group) == ranks
    torch.distributed.all_gather_object(found, mine, group=groups.control)
    return all(found)


def _mode_groups(groups: Groups, mode: Mode, world: Any, borrowed: Any = None) -> tuple[Any, Any]:
    """This rank's SP and TP group in `mode`; None for a group of one. Groups made on the way join `owned`.

    `borrowed` is the SP group, where the job has it already.
    """
    layout, shard = groups.layout, groups.shard
    if mode.tp == 1:
        return borrowed or world, None  # then shards are in rank order, whatever the rank order is
    if mode.sp == 1:
        return None, world
    if layout.rank_order == "sp_inner" and borrowed is None:
        return _mesh_groups(mode, groups.owned)
    sp_groups = {tuple(layout.sp_group(mode, g)) for g in range(layout.world_size)}
    tp_groups = {tuple(layout.tp_group(mode, g)) for g in range(layout.world_size)}
    rank = layout.rank_of(shard)
    sp_group = borrowed or _own_group(sp_groups, rank, groups.owned)
    return sp_group, _own_group(tp_groups, rank, groups.owned)


def _mesh_groups(mode: Mode, owned: list[Any]) -> tuple[Any, Any]:
    """With SP innermost a DeepSpeed mesh of (dp, tp, sp) is the layout of the mode, in the same order."""
    import deepspeed.comm as comm

    mesh = comm.initialize_mesh_device((1, mode.tp, mode.sp), MESH_NAMES)
    owned += mesh.get_all_groups()
    return mesh.get_group("sequence_parallel"), mesh.get_group("tensor_parallel")


def _own_group(members: set[tuple[int, ...]], rank: int, owned: list[Any]) -> Any:
    """Create every group on every rank, in one agreed order, and keep the one this rank is in.

    Torch orders a group by rank. SP members ascend with their shard in both rank orders, so the all-to-all is
    in shard order; TP members may not, but they only sum.
    """
    mine = None
    for ranks in sorted(members):
        group = _new_group(sorted(ranks))
        if rank in ranks:
            mine = group
    owned.append(mine)
    return mine
