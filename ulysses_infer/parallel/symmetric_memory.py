"""Symmetric memory: GPU memory of each rank of a process group that all its ranks can address."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch

from ulysses_infer.errors import first_line
from ulysses_infer.host import host_identity
from ulysses_infer.kernels.launch import runs_kernels

if TYPE_CHECKING:
    from ulysses_infer.kernels.peers import PeerBuffers

SMALL_BYTES = 512 << 10
"""The largest message that travels through symmetric memory. Above it NCCL's bandwidth counts more than its latency."""
T = TypeVar("T")
TORCH_OPERATORS = ("two_shot_all_reduce_", "multimem_all_reduce_")


class SymmetricMemoryUnavailableError(Exception):
    """The ranks cannot share GPU memory; raised on all of them, with the reason."""


@dataclass(frozen=True)
class SymmetricMemory:
    """The memory of one process group: `SMALL_BYTES` for torch's operators, then what `PeerBuffers` describes."""

    local: torch.Tensor
    """[memory_bytes(ranks)] uint8, of this rank."""
    addresses: list[int]
    """Where each rank's memory is mapped in this process, in group order."""
    rank: int
    group_name: str
    has_multicast: bool
    handle: Any = None
    """Keeps the mappings alive."""

    def staging(self, like: torch.Tensor) -> torch.Tensor:
        """Memory of the shape and dtype of `like`, at the start, for torch's operators."""
        return self.local[: like.nbytes].view(like.dtype).view(like.shape)

    def peer_buffers(self) -> PeerBuffers:
        """The rest, for our kernels."""
        from ulysses_infer.kernels.peers import PROGRAMS, PeerBuffers

        device = self.local.device
        halves = torch.tensor(self.addresses, device=device) + SMALL_BYTES
        epochs = torch.zeros(PROGRAMS, dtype=torch.int64, device=device)
        return PeerBuffers(halves, halves + 2 * SMALL_BYTES, epochs, self.rank, SMALL_BYTES)


def memory_bytes(ranks: int) -> int:
    """Bytes of one rank's memory."""
    from ulysses_infer.kernels.peers import flag_bytes

    return 3 * SMALL_BYTES + flag_bytes(ranks)


class Allocator(Protocol):
    """Where symmetric memory comes from."""

    def obstacle(self, device: torch.device) -> str:
        """Why this rank cannot have any on `device`; empty if nothing is known to prevent it."""
        ...

    def reserve(self, size: int, device: torch.device) -> torch.Tensor:
        """[size] uint8 zeros. Not collective."""
        ...

    def meet(self, local: torch.Tensor, process_group: Any) -> SymmetricMemory:
        """Map the memory that all ranks of the group have reserved. Collective."""
        ...


class TorchAllocator:
    """`torch.distributed._symmetric_memory`."""

    def obstacle(self, device: torch.device) -> str:
        """See `Allocator.obstacle`."""
        if device.type != "cuda" or not torch.cuda.is_available():
            return "there is no GPU"
        if not runs_kernels(device):
            return "Triton kernels do not run on this device"
        try:
            importlib.import_module("torch.distributed._symmetric_memory")  # defines the operators
        except ImportError as error:
            return f"torch has no symmetric memory: {first_line(error)}"
        missing = [name for name in TORCH_OPERATORS if not hasattr(torch.ops.symm_mem, name)]
        return f"torch lacks symm_mem::{missing[0]}" if missing else ""

    def reserve(self, size: int, device: torch.device) -> torch.Tensor:
        """See `Allocator.reserve`."""
        from torch._C._distributed_c10d import _SymmetricMemory

        # Not from the memory pool of `symmetric_memory.empty`: some of torch's operators ignore the place in a pool.
        local = _SymmetricMemory.empty_strided_p2p((size,), [1], torch.uint8, device).zero_()
        torch.cuda.synchronize(device)
        return local

    def meet(self, local: torch.Tensor, process_group: Any) -> SymmetricMemory:
        """See `Allocator.meet`."""
        import torch.distributed._symmetric_memory as symmetric

        handle = symmetric.rendezvous(local, process_group)
        addresses = list(handle.buffer_ptrs)
        if addresses[handle.rank] != local.data_ptr():
            raise RuntimeError("torch maps symmetric memory at another place than expected")
        multicast = bool(handle.multicast_ptr)
        return SymmetricMemory(local, addresses, handle.rank, process_group.group_name, multicast, handle)


def share_symmetric_memory(
    process_groups: Sequence[Any], device: torch.device, control: Any, allocator: Allocator
) -> list[SymmetricMemory | None]:
    """Symmetric memory for each process group of this rank (None: no group). Collective over the gloo group `control`.

    All ranks pass equally many. Raises `SymmetricMemoryUnavailableError` on every rank if any of them cannot take part:
    each stage ends when all ranks have finished it, so that none waits for a rank that has failed before.
    """
    hosts = _gather(host_identity(), control)
    if len(set(hosts)) > 1:
        raise SymmetricMemoryUnavailableError("the ranks are not on one host")
    _together(control, lambda: _raise_obstacle(allocator, device))
    reserved = _together(control, lambda: [_reserve(group, device, allocator) for group in process_groups])
    memories = [
        _together(control, functools.partial(_meet, local, group, allocator))
        for group, local in zip(process_groups, reserved, strict=True)
    ]
    has_multicast = all(_gather(all(memory.has_multicast for memory in memories if memory), control))
    memories = [memory and replace(memory, has_multicast=has_multicast) for memory in memories]
    _together(control, lambda: _greet(memories))
    _together(control, lambda: _check_greetings(memories))
    return memories


def _raise_obstacle(allocator: Allocator, device: torch.device) -> None:
    obstacle = allocator.obstacle(device)
    if obstacle:
        raise SymmetricMemoryUnavailableError(obstacle)


def _reserve(process_group: Any, device: torch.device, allocator: Allocator) -> torch.Tensor | None:
    if process_group is None:
        return None
    return allocator.reserve(memory_bytes(torch.distributed.get_world_size(process_group)), device)


def _meet(local: torch.Tensor | None, process_group: Any, allocator: Allocator) -> SymmetricMemory | None:
    return None if local is None else allocator.meet(local, process_group)


def _greet(memories: Sequence[SymmetricMemory | None]) -> None:
    """Write this rank's number to the memory of every peer."""
    from ulysses_infer.kernels.peers import greet

    for memory in filter(None, memories):
        greet(memory.peer_buffers())
        memory.local[0].item()  # waits for the device


def _check_greetings(memories: Sequence[SymmetricMemory | None]) -> None:
    """Read what all ranks have written everywhere: some machines map the memory of other GPUs and lose such writes."""
    from ulysses_infer.kernels.peers import greetings

    for memory in filter(None, memories):
        ranks = list(range(len(memory.addresses)))
        if greetings(memory.peer_buffers()).tolist() != [ranks] * len(ranks):
            raise SymmetricMemoryUnavailableError("what GPUs write to each other does not arrive")


def _together(control: Any, stage: Callable[[], T]) -> T:
    """Run a stage on every rank; if it fails on one, raise that rank's reason on all of them. Collective."""
    try:
        result, problem = stage(), ""
    except Exception as error:
        result, problem = None, f"rank {torch.distributed.get_rank(control)}: {first_line(error)}"
    for each in filter(None, _gather(problem, control)):
        raise SymmetricMemoryUnavailableError(each)
    return cast("T", result)


def _gather(value: T, control: Any) -> list[T]:
    values: list[Any] = [None] * torch.distributed.get_world_size(control)
    torch.distributed.all_gather_object(values, value, group=control)
    return values
