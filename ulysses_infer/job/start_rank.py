"""Brings one rank up: device, process groups, weights, KV cache. All ranks run this with the same configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

import torch

from ulysses_infer.config import Config, choose_for_device, refuse_unavailable
from ulysses_infer.errors import ConfigError
from ulysses_infer.host import cpu_quota, host_identity, ranks_on_this_host, shared_cores
from ulysses_infer.job.draft_head import LoadedHead, load_head
from ulysses_infer.job.draft_model import LoadedDraft, load_draft, without_draft
from ulysses_infer.job.load_model import LoadedModel, load_model
from ulysses_infer.job.make_offload import make_offload, without_offload
from ulysses_infer.job.make_worker import make_worker
from ulysses_infer.model.loading.checkpoint import Progress
from ulysses_infer.model.loading.sources import GivenModel
from ulysses_infer.parallel.groups import ProcessGroups, Rendezvous, build_groups, init_distributed
from ulysses_infer.parallel.layout import check_mode
from ulysses_infer.worker.channel import Channel
from ulysses_infer.worker.cores import PinnedCores, pin
from ulysses_infer.worker.memory import keep_freed_memory
from ulysses_infer.worker.rank import Rank

T = TypeVar("T")
logger = logging.getLogger(__name__)


def start_rank(
    config: Config,
    model: GivenModel | None = None,
    progress: Progress | None = None,
    rendezvous: Callable[[], Rendezvous] | None = None,
) -> Rank:
    """Join the process groups, load this rank's share of the weights, allocate its cache. Collective.

    model: a model in memory whose weights are used instead of `config.model.path`. rendezvous: says where the ranks
    meet if no launcher's environment does. An error on any rank is raised on all of them, as a `UlyssesError` of one
    line.
    """
    refuse_unavailable(config)
    device = choose_device(config.runtime.device)
    choose_for_device(config, device.type)
    ranks_on_host = ranks_on_this_host(config.parallel.layout.world_size)
    groups = _join_groups(config, device, model, rendezvous)
    channel = Channel(groups)
    if device.type == "cpu":
        keep_freed_memory()
    pinned = _share_cores(config, device, channel, groups, ranks_on_host)
    try:
        loaded = load_model(config, model, progress, channel, groups, device, ranks_on_host)
        draft = load_draft(config, loaded, channel, groups, device, ranks_on_host)
        head = load_head(config, loaded, channel, groups, device)
        return _make_rank(config, loaded, draft, head, channel, groups, device, pinned, ranks_on_host)
    except BaseException:
        if pinned is not None:
            pinned.release()
        raise


def finish_start(rank: Rank, config: Config, last_phase: Callable[[], T]) -> tuple[T, list[int]]:
    """Run the last phase of a start and return its result and the weight bytes of every rank. Collective.

    From here on waits for other ranks are limited by `runtime.step_timeout`.
    """
    result = rank.channel.together(last_phase)
    weight_bytes = rank.channel.gather(rank.worker.model.weight_bytes)
    rank.groups.limit_waits(config.runtime.step_timeout)
    return result, weight_bytes


def choose_device(name: str) -> torch.device:
    """The device of this process: its GPU by LOCAL_RANK, or the CPU. Raises `ConfigError`."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("runtime.device is cuda, but torch sees no GPU here; use cpu, or install torch for CUDA")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def set_threads(config: Config, device: torch.device, share: int) -> None:
    """Use `share` threads for a rank on the CPU: more threads than cores only wait for each other."""
    if config.runtime.threads_per_rank is not None:
        torch.set_num_threads(config.runtime.threads_per_rank)
    elif device.type == "cpu":
        torch.set_num_threads(min(share, torch.get_num_threads()) if "OMP_NUM_THREADS" in os.environ else share)


def _join_groups(
    config: Config,
    device: torch.device,
    model: GivenModel | None,
    rendezvous: Callable[[], Rendezvous] | None,
) -> ProcessGroups:
    layout, modes = config.parallel.layout, config.parallel.available_modes
    for mode in modes:
        check_mode(layout, mode)
    if layout.world_size > 1:
        init_distributed(device, meet=rendezvous)
    num_ranks = None if rendezvous is None else layout.world_size
    external_group = None if model is None else model.sequence_parallel_group
    return build_groups(layout, modes, device, num_ranks, config.runtime.collectives, external_group)


def _share_cores(
    config: Config, device: torch.device, channel: Channel, groups: ProcessGroups, ranks_on_host: int
) -> PinnedCores | None:
    """Set the threads, shorten waits if there are more of them than cores, and pin the rank to its cores. Collective.

    Done before any large allocation: memory is placed near the core that first writes it.
    """
    host, own = host_identity(), frozenset(os.sched_getaffinity(0))
    cores_of_ranks = channel.gather((host, own))
    on_host = [cores for other, cores in cores_of_ranks if other == host]
    shared = shared_cores(own, on_host, ranks_on_host, cpu_quota())
    set_threads(config, device, shared.threads_per_rank)
    if crowding := shared.crowding(torch.get_num_threads() if device.type == "cpu" else 1):
        groups.yield_early()
        if groups.is_first:
            logger.warning(crowding)
    if device.type != "cpu" or not config.runtime.pin_cores:
        return None
    local_rank = int(os.environ.get("LOCAL_RANK", groups.rank)) % ranks_on_host
    return pin(local_rank, ranks_on_host, torch.get_num_threads(), [cores for _, cores in cores_of_ranks])


def _make_rank(
    config: Config,
    loaded: LoadedModel,
    draft: LoadedDraft | None,
    head: LoadedHead | None,
    channel: Channel,
    groups: ProcessGroups,
    device: torch.device,
    pinned: PinnedCores | None,
    ranks_on_host: int,
) -> Rank:
    budget = without_draft(loaded.budget, draft)
    remaining = channel.together(lambda: without_offload(budget, config, loaded.model, groups, device, ranks_on_host))
    budget = remaining if head is None else head.within(remaining, loaded)
    worker = make_worker(config, loaded.model, budget, channel, groups, device)
    worker.drafter = channel.together(lambda: None if draft is None else draft.make(device))
    if head is not None:
        worker.drafter = channel.together(lambda: head.make(worker, device))
    worker.offload = make_offload(config, worker, channel)
    return Rank(worker, channel, groups, loaded.weights, loaded.folder, pinned)
