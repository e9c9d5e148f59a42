"""New weights from OpenRLHF's trainer, tensor by tensor: how each comes, and when all are there."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import torch

from ulysses_infer.errors import RequestError
from ulysses_infer.job.weight_transfer import connect
from ulysses_infer.rl.engine_server import EngineServer
from ulysses_infer.rl.openrlhf_seats import Seats
from ulysses_infer.rl.weight_folder import WeightFolder

JOIN_SECONDS = 300.0
DEVICE_ARGUMENT = 6
"""Of torch's function that opens a CUDA tensor of another process: the index of the device."""


class BroadcastWeights:
    """Tensors that the trainer broadcasts to all ranks of the server, each of which keeps its slices."""

    def __init__(self, server: EngineServer) -> None:
        self._server = server
        self._is_open = False
        self._num_updates = 0

    async def join(self, address: str, port: int, first_rank: int, world_size: int) -> None:
        """Join the trainer's group; the server's ranks are those from `first_rank` on. Raises `RequestError`."""
        num_ranks = self._server.config.parallel.world_size
        if first_rank + num_ranks > world_size:
            raise RequestError(
                f"a group of {world_size} has no room for {num_ranks} ranks from number {first_rank} on; count "
                "parallel.sp * parallel.tp ranks for each engine"
            )
        info = {"master_address": address, "master_port": port, "rank_offset": first_rank, "world_size": world_size}
        await self._server.call("/init_weight_transfer_engine", {"init_info": info})

    async def receive(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], is_last: bool) -> None:
        """Receive one tensor; with the last one the weights are served. Raises `RequestError` while requests run that
        are not paused."""
        if not self._is_open:
            await self._server.call("/start_weight_update")
            self._is_open = True
        kind = str(dtype).removeprefix("torch.")
        info = {"names": [name], "dtype_names": [kind], "shapes": [list(shape)]}
        await self._server.call("/update_weights", {"update_info": info})
        if is_last:
            self._is_open = False
            self._num_updates += 1
            await self._server.call("/finish_weight_update", {"weight_version": str(self._num_updates)})


class CopiedWeights:
    """Tensors that this process holds one after another: copied to files, which the server's ranks read."""

    def __init__(self, server: EngineServer) -> None:
        self._server = server
        self._folder: WeightFolder | None = None
        self._num_updates = 0

    async def take(self, name: str, tensor: torch.Tensor, is_last: bool) -> None:
        """Copy one tensor; with the last one the weights are served, also by requests that run."""
        if self._folder is None:
            self._folder = WeightFolder()
        await asyncio.to_thread(self._folder.add, name, tensor)
        if is_last:
            with self._folder as folder:
                self._folder = None
                self._num_updates += 1
                await self._server.load_weights(folder.finish(), str(self._num_updates))


class CollectiveWeights(CopiedWeights):
    """Tensors that the trainer broadcasts by `ray.util.collective` to this actor, and to `seats`, because the trainer
    counts all tensor-parallel ranks. backend: nccl or gloo."""

    def __init__(self, server: EngineServer, seats: Seats, group_name: str, backend: str) -> None:
        super().__init__(server)
        self._seats, self._group_name, self._backend = seats, group_name, backend
        self._device = "cuda" if backend == "nccl" else "cpu"

    async def join(self, world_size: int, rank: int) -> None:
        """Join the trainer's group. Raises `RequestError` if a tensor-parallel rank has no seat."""
        num_ranks = self._server.config.parallel.tp
        if len(self._seats) < num_ranks - 1:
            raise RequestError(
                f"vllm.sync_with_ray with a tensor_parallel_size of {num_ranks}: the other ranks have no seats; "
                "make the engines with create_vllm_engines"
            )
        from ray.util import collective

        others = self._seats.join(world_size, rank + 1, self._backend, self._group_name)
        await asyncio.gather(
            asyncio.to_thread(collective.init_collective_group, world_size, rank, self._backend, self._group_name),
            *others,
        )

    async def receive(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], is_last: bool) -> None:
        """Receive one tensor; with the last one the weights are served."""
        from ray.util import collective

        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        others = self._seats.receive(shape, dtype, self._device, self._group_name)
        await asyncio.gather(asyncio.to_thread(collective.broadcast, tensor, 0, self._group_name), *others)
        await self.take(name, tensor, is_last)


class CudaHandles(CopiedWeights):
    """Tensors in the memory of this actor's GPU that the trainer's process shares."""

    async def receive(self, name: str, handles: Mapping[str, Any], is_last: bool) -> None:
        """Open one tensor. handles: (function, arguments) of torch's `reduce_tensor`, by the GPU's id."""
        await self.take(name, opened(handles, gpu_id()), is_last)


def gpu_id() -> str:
    """The id of this process's GPU, as OpenRLHF names it."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def opened(handles: Mapping[str, Any], gpu: str, index: int = 0) -> torch.Tensor:
    """The tensor of a GPU, whose index in this process is `index`. Raises `RequestError` if it has none."""
    if gpu not in handles:
        raise RequestError(f"no tensor is shared on GPU {gpu}, only on {', '.join(sorted(handles))}")
    function, arguments = handles[gpu]
    own = list(arguments)
    own[DEVICE_ARGUMENT] = index
    tensor: torch.Tensor = function(*own)
    return tensor


class TrainerGroup:
    """The trainer's end of `BroadcastWeights`, with the method that OpenRLHF's trainer calls."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def broadcast(self, tensor: torch.Tensor, src: int = 0, stream: Any = None) -> None:
        """Send one tensor to all ranks. stream: without effect; the tensor is sent when this returns."""
        self._group.broadcast(tensor.contiguous(), src).wait()


def stateless_init_process_group(
    master_address: str, master_port: int, rank: int, world_size: int, device: torch.device | str
) -> TrainerGroup:
    """OpenRLHF's function of this name, for the trainer (rank 0): NCCL on GPUs, gloo on CPUs. Raises `RequestError`."""
    return TrainerGroup(connect(master_address, master_port, rank, world_size, torch.device(device), JOIN_SECONDS))
