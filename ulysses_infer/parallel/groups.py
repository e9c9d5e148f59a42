"""All process groups of one replica, taken from DeepSpeed's device meshes."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch

from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.collectives import CollectiveClock, Collectives
from ulysses_infer.parallel.group import Mailbox, ProcessGroup
from ulysses_infer.parallel.layout import Layout, Mode, Place
from ulysses_infer.parallel.shared_memory import SharedMemory, SharedMemoryUnavailableError, share_memory
from ulysses_infer.parallel.symmetric_memory import (
    SMALL_BYTES,
    Allocator,
    SymmetricMemoryUnavailableError,
    TorchAllocator,
    share_symmetric_memory,
)
from ulysses_infer.parallel.torch_group import TorchMailbox, TorchProcessGroup

logger = logging.getLogger(__name__)

MESH_NAMES = ("data_parallel", "tensor_parallel", "sequence_parallel")
FORMING_TIMEOUT = timedelta(seconds=60)  # creating a process group takes a moment, unless a rank is lost
START_TIMEOUT = timedelta(minutes=30)  # ranks may take very different times to download and load
IDLE_TIMEOUT = timedelta(days=365)  # how long the other ranks wait for rank 0 to have work


@dataclass(frozen=True)
class Rendezvous:
    """The store through which the ranks of an engine in plain Python meet; a launcher sets environment variables."""

    store: Any
    rank: int
    world_size: int


@dataclass
class ProcessGroups:
    """This rank's process groups, its head shard and the collectives of every loaded mode.

    Holds the only references to the process groups, so that `close` closes their connections and other ranks notice.
    """

    layout: Layout
    rank: int
    world: ProcessGroup | None = None
    mailbox: Mailbox | None = None  # for messages from rank 0
    control: Any = None  # gloo group for occasional agreement between ranks
    by_mode: dict[Mode, Collectives] = field(default_factory=dict)
    clock: CollectiveClock = field(default_factory=CollectiveClock)  # shared by all modes
    owned: list[Any] = field(default_factory=list)  # every torch process group of this engine, including `control`
    memory: SharedMemory | None = None  # holds the process groups if they are not torch's

    def close(self) -> None:
        """Destroy the process groups that `build_groups` created, but not the job's own. Not collective.

        Ranks that wait in one of them raise RuntimeError at once.
        """
        self.by_mode.clear()
        self.world = self.mailbox = self.control = None
        if self.memory is not None:
            self.memory.close()
        while self.owned:
            _destroy(self.owned.pop())

    def limit_waits(self, seconds: float) -> None:
        """Set the timeout of all collectives; a rank that waits longer raises RuntimeError.

        Waiting for the next message from rank 0 is not limited: an engine may be idle for days.
        """
        for process_group in self.owned:
            idles = process_group is self.control and not self.is_first
            process_group.set_timeout(IDLE_TIMEOUT if idles else timedelta(seconds=seconds))
        if self.memory is not None:
            self.memory.limit_waits(seconds)

    def yield_early(self) -> None:
        """Have waits in shared memory give up the core soon."""
        if self.memory is not None:
            self.memory.yield_early()

    def gather_to_first(self, shard: torch.Tensor) -> torch.Tensor | None:
        """Gather the `shard` of every rank, all of one shape, on rank 0: [W, *shape] in rank order; None elsewhere."""
        if self.layout.world_size == 1:
            return shard[None]
        assert self.world is not None
        return self.world.gather_to_first(shard)

    @property
    def shard(self) -> int:
        """The head shard that this rank owns."""
        return self.layout.shard_of(self.rank)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which schedules."""
        return self.rank == 0

    @property
    def shard_order(self) -> list[int]:
        """Ranks in the order of their head shards."""
        return [self.layout.rank_of(shard) for shard in range(self.layout.world_size)]

    def place(self, mode: Mode) -> Place:
        """This rank's place in `mode`."""
        return self.layout.place(mode, self.shard)


def _destroy(process_group: Any) -> None:
    import deepspeed.comm as comm

    comm.destroy_process_group(process_group)


def init_distributed(
    device: torch.device, timeout: timedelta = START_TIMEOUT, meet: Callable[[], Rendezvous] | None = None
) -> None:
    """Join the default process group through DeepSpeed, as `meet()` or the launcher's environment says. Idempotent."""
    if device.type == "cpu":
        # Read by DeepSpeed at import: otherwise every process probes for accelerators and warns.
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
        rendezvous = meet()
        torch.distributed.init_process_group(
            backend,
            store=rendezvous.store,
            rank=rendezvous.rank,
            world_size=rendezvous.world_size,
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
    allocator: Allocator | None = None,
) -> ProcessGroups:
    """Create the process groups of every mode. Collective: all ranks call it with the same arguments.

    `num_ranks`: of the job; by default from the launcher's environment. `collectives`: as `runtime.collectives`.
    `external_group`: a sequence-parallel process group of the job, used by modes with the same ranks; it outlives the
    engine. `allocator`: of symmetric memory; by default torch's. Raises `ConfigError` on every rank if the job and the
    layout differ in the number of ranks, or if memory must be shared and cannot be.
    """
    if layout.world_size == 1:
        _check_world_size(layout, num_ranks or int(os.environ.get("WORLD_SIZE", "1")))
        single = ProcessGroups(layout, rank=0)
        single.by_mode[Mode(1, 1)] = Collectives(single.place(Mode(1, 1)), None, None, single.clock)
        return single
    import deepspeed.comm as comm

    _check_world_size(layout, comm.get_world_size())
    control = _new_group(range(layout.world_size), backend="gloo")
    control.set_timeout(START_TIMEOUT)
    groups = ProcessGroups(layout, comm.get_rank(), control=control, owned=[control])
    reason = _share_memory(groups, modes, device, collectives)
    used = "shared memory"
    if reason:
        _use_torch(groups, modes, external_group)
        used = f"torch: {reason}"
        if device.type != "cpu":
            used = _use_gpu_memory(groups, device, collectives, allocator or TorchAllocator())
    if groups.is_first:
        logger.info("collectives use %s", used)
    return groups


def _share_memory(groups: ProcessGroups, modes: list[Mode], device: torch.device, collectives: str) -> str:
    """Use shared memory for all collectives, or return why not. Collective, with the same result on every rank."""
    if collectives == "torch":
        return "runtime.collectives = torch"
    try:
        if device.type != "cpu":
            raise SharedMemoryUnavailableError("tensors are not in CPU memory")
        if collectives == "symmetric_memory":
            raise ConfigError("runtime.collectives = symmetric_memory needs GPUs; use auto, shared_memory or torch")
        _use_memory(groups, modes)
    except SharedMemoryUnavailableError as error:
        if collectives == "shared_memory":
            raise ConfigError(f"runtime.collectives = shared_memory, but {error}; use auto or torch") from error
        return str(error)
    return ""


def _use_gpu_memory(groups: ProcessGroups, device: torch.device, collectives: str, allocator: Allocator) -> str:
    """Let small messages between GPUs, and messages from rank 0, travel through memory. Collective; returns what does.

    Raises `ConfigError` on every rank if that is required and impossible.
    """
    if collectives == "torch":
        return "torch: runtime.collectives = torch"
    _share_mailbox(groups)
    try:
        _use_symmetric_memory(groups.by_mode, groups.control, device, allocator)
    except SymmetricMemoryUnavailableError as error:
        if collectives == "symmetric_memory":
            raise ConfigError(f"runtime.collectives = symmetric_memory, but {error}; use auto or torch") from error
        return f"torch: no symmetric memory: {error}"
    return f"symmetric memory up to {SMALL_BYTES >> 10} KiB, torch above"


def _share_mailbox(groups: ProcessGroups) -> None:
    """Send messages from rank 0 through shared memory instead of the control group, if the ranks can share any."""
    try:
        groups.memory = share_memory(groups.rank, [], groups.control)
    except SharedMemoryUnavailableError as error:
        if groups.is_first:
            logger.info("step plans travel by gloo: %s", error)
        return
    groups.mailbox = groups.memory.mailbox()


def _use_symmetric_memory(
    by_mode: dict[Mode, Collectives], control: Any, device: torch.device, allocator: Allocator
) -> None:
    """Replace the process groups of all modes, each of which gets its memory once."""
    pairs = {mode: [_torch_group(group) for group in (each.sp_group, each.tp_group)] for mode, each in by_mode.items()}
    distinct = list(dict.fromkeys(itertools.chain(*pairs.values())))  # the modes at both ends share one of all ranks
    memories = share_symmetric_memory(distinct, device, control, allocator)
    from ulysses_infer.parallel.symmetric_group import SymmetricGroup

    made = {
        group: None if memory is None else SymmetricGroup(group, memory)
        for group, memory in zip(distinct, memories, strict=True)
    }
    for mode, (sp_group, tp_group) in pairs.items():
        by_mode[mode] = replace(by_mode[mode], sp_group=made[sp_group], tp_group=made[tp_group])


def _torch_group(group: ProcessGroup | None) -> Any:
    """The process group of torch that `group` uses."""
    assert group is None or isinstance(group, TorchProcessGroup)
    return group and group.process_group


def _use_memory(groups: ProcessGroups, modes: list[Mode]) -> None:
    layout = groups.layout
    all_ranks = tuple(range(layout.world_size))
    rank_sets = {all_ranks}
    for mode, shard in itertools.product(modes, all_ranks):
        rank_sets |= {tuple(ranks) for ranks in _group_ranks(layout, mode, shard) if len(ranks) > 1}
    groups.memory = memory = share_memory(groups.rank, sorted(rank_sets), groups.control)
    made = {ranks: memory.group(ranks) for ranks in sorted(rank_sets)}
    groups.world, groups.mailbox = made[all_ranks], memory.mailbox()
    for mode in modes:
        sp_ranks, tp_ranks = _group_ranks(layout, mode, groups.shard)
        groups.by_mode[mode] = Collectives(
            groups.place(mode), made.get(tuple(sp_ranks)), made.get(tuple(tp_ranks)), groups.clock, groups.world
        )


def _group_ranks(layout: Layout, mode: Mode, shard: int) -> tuple[list[int], list[int]]:
    """Ranks of the SP and the TP group of a shard, ascending. For SP that is also the order of the shards."""
    return sorted(layout.sp_group(mode, shard)), sorted(layout.tp_group(mode, shard))


def _use_torch(groups: ProcessGroups, modes: list[Mode], external_group: Any) -> None:
    # Not the job's default group: this one has its own timeout and is destroyed with the engine.
    world = _new_group(range(groups.layout.world_size))
    groups.owned.append(world)
    groups.world, groups.mailbox = TorchProcessGroup(world), TorchMailbox(groups.control)
    for mode in modes:
        external_sp = external_group if _is_sp_group(groups, mode, external_group) else None
        sp_group, tp_group = (
            group and TorchProcessGroup(group) for group in _mode_groups(groups, mode, world, external_sp)
        )
        groups.by_mode[mode] = Collectives(groups.place(mode), sp_group, tp_group, groups.clock, groups.world)


def _new_group(ranks: Iterable[int], backend: str | None = None) -> Any:
    """Like `deepspeed.comm.new_group`, but with a timeout. `backend` None: that of the job."""
    return torch.distributed.new_group(list(ranks), timeout=FORMING_TIMEOUT, backend=backend)


def _check_world_size(layout: Layout, world_size: int) -> None:
    if layout.world_size != world_size:
        sp, tp = layout.base
        raise ConfigError(
            f"parallel.sp * parallel.tp = {sp} * {tp} = {layout.world_size}, but the job has {world_size} ranks; "
            f"start {layout.world_size} ranks (deepspeed --num_gpus {layout.world_size}) or change parallel.sp/tp"
        )


def _is_sp_group(groups: ProcessGroups, mode: Mode, external_group: Any) -> bool:
    """Whether `external_group` is the SP group of `mode` on every rank. Collective if there is an external group."""
    if external_group is None:
        return False
    ranks = _group_ranks(groups.layout, mode, groups.shard)[0]
    matches: list[bool] = [False] * groups.layout.world_size
    mine = torch.distributed.get_process_group_ranks(external_group) == ranks
    torch.distributed.all_gather_object(matches, mine, group=groups.control)
    return all(matches)


def _mode_groups(groups: ProcessGroups, mode: Mode, world: Any, external_sp: Any = None) -> tuple[Any, Any]:
    """This rank's SP and TP process group in `mode`; None for a single rank. New ones are added to `owned`.

    `external_sp`: the job's process group that serves as the SP group, if any.
    """
    layout, shard = groups.layout, groups.shard
    if mode.tp == 1:
        return external_sp or world, None  # shards ascend with ranks in either rank order
    if mode.sp == 1:
        return None, world
    if layout.rank_order == "sp_inner" and external_sp is None:
        return _mesh_groups(mode, groups.owned)
    sp_groups = {tuple(layout.sp_group(mode, g)) for g in range(layout.world_size)}
    tp_groups = {tuple(layout.tp_group(mode, g)) for g in range(layout.world_size)}
    rank = layout.rank_of(shard)
    sp_group = external_sp or _create_groups(sp_groups, rank, groups.owned)
    return sp_group, _create_groups(tp_groups, rank, groups.owned)


def _mesh_groups(mode: Mode, owned: list[Any]) -> tuple[Any, Any]:
    """Process groups from a DeepSpeed mesh of (dp, tp, sp), which with SP innermost matches the layout of the mode."""
    import deepspeed.comm as comm

    mesh = comm.initialize_mesh_device((1, mode.tp, mode.sp), MESH_NAMES)
    owned += mesh.get_all_groups()
    return mesh.get_group("sequence_parallel"), mesh.get_group("tensor_parallel")


def _create_groups(rank_sets: set[tuple[int, ...]], rank: int, owned: list[Any]) -> Any:
    """Create all process groups on every rank, in the same order, and return the one that contains this rank.

    Torch orders a process group by rank. SP ranks ascend with their shards in both rank orders, so the all-to-all is
    in shard order. TP ranks may not, but their only collective is a sum.
    """
    mine = None
    for ranks in sorted(rank_sets):
        process_group = _new_group(sorted(ranks))
        if rank in ranks:
            mine = process_group
    owned.append(mine)
    return mine
