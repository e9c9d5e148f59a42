"""New weights from a trainer in another process: by broadcasts in a process group of the trainer and all ranks.

The trainer is rank 0 of the group. It announces names, dtypes and shapes over HTTP and broadcasts the tensors in that
order. Each rank keeps its own slices; the weights are written once all have arrived.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ulysses_infer.errors import CheckpointError, RequestError, fatal, first_line
from ulysses_infer.model.loading.staging import StagedWeights
from ulysses_infer.worker.rank import Rank

PREFIX = "ulysses_infer_weights"
TRAINER = 0


def connect(address: str, port: int, rank: int, world_size: int, device: torch.device, seconds: float) -> Any:
    """The process group of a trainer (rank 0, which hosts the store) and all ranks. Raises `RequestError`."""
    timeout = datetime.timedelta(seconds=seconds)
    try:
        store = dist.TCPStore(address, port, world_size, rank == TRAINER, timeout, wait_for_workers=False)
        named = dist.PrefixStore(PREFIX, store)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return dist.ProcessGroupNCCL(named, rank, world_size, options)
        return dist.ProcessGroupGloo(named, rank, world_size, timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{address}:{port} as rank {rank} of {world_size}"
        raise RequestError(f"no process group with the trainer at {where}: {first_line(error)}") from error


def join_trainer(rank: Rank, address: str, port: int, first_rank: int, world_size: int, seconds: float) -> None:
    """Join the trainer's process group. Collective. first_rank: that of this replica's rank 0 in the group."""
    number, device = first_rank + rank.groups.rank, rank.worker.device
    rank.transfer.group = rank.channel.together(
        lambda: connect(address, port, number, world_size, device, seconds),
    )


def start_update(rank: Rank) -> None:
    """Forget what an unfinished update has brought, and wait for the tensors of a new one. Collective."""
    rank.transfer.staged = StagedWeights()


def receive_tensors(rank: Rank, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
    """Receive tensors in the order of `names`. Collective.

    Memory is lowest if all tensors of the model are named at once: a rank then knows which slices it needs.
    """
    staged = rank.channel.together(rank.transfer.begun)
    kinds = rank.channel.together(lambda: [_dtype(name) for name in dtypes])
    full = {name: tuple(shape) for name, shape in zip(names, shapes, strict=True)}
    reads = rank.weights.reads_of(full)
    if rank.transfer.group is None:
        raise RequestError("there is no process group with the trainer; call init_weight_transfer_engine first")
    with fatal("receiving new weights"):
        for (name, shape), dtype in zip(full.items(), kinds, strict=True):
            buffer = torch.empty(shape, dtype=dtype, device=rank.worker.device)
            rank.transfer.group.broadcast(buffer, TRAINER).wait()
            staged.add(name, buffer, reads)


def finish_update(rank: Rank) -> None:
    """Write the weights that have arrived. Collective; nothing is written unless all ranks have all tensors."""
    staged = rank.channel.together(rank.transfer.begun)
    rank.transfer.staged = None
    rank.channel.together(lambda: rank.weights.check(staged))
    with fatal("writing the new weights"):
        rank.channel.together(lambda: rank.weights.write(staged))


def _dtype(name: str) -> torch.dtype:
    """The dtype called `name`, as "bfloat16" or "torch.bfloat16"."""
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"the dtype {name[:40]!r} is unknown; use names such as bfloat16")
    return found
