"""Bring one rank up: device, groups, weights, cache. Every rank runs this with the same configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ulysses_infer.attention.backend import AttentionBackend, KernelAttention
from ulysses_infer.attention.native import NativeAttention
from ulysses_infer.attention.selection import AttentionNeeds, make_backend, make_gpu_backend
from ulysses_infer.cache.budget import MemoryBudget, activation_bytes, available_memory, cache_bytes, check_weights_fit
from ulysses_infer.cache.groups import LayerGroups
from ulysses_infer.cache.paged import FP8, CacheShape, PagedCache
from ulysses_infer.cache.sizing import CacheSizing
from ulysses_infer.config import CacheConfig, Config, choose_for_device, refuse_unavailable
from ulysses_infer.errors import ConfigError
from ulysses_infer.host import ranks_on_this_host
from ulysses_infer.model.layers.latent_chunks import PAGE_BYTES
from ulysses_infer.model.loading.checkpoint import Progress
from ulysses_infer.model.loading.files import resolve_folder
from ulysses_infer.model.loading.sources import Checkpoint, GivenModel, find_checkpoint
from ulysses_infer.model.loading.weights import Weights
from ulysses_infer.model.lora.adapter import read_adapter, stored_bytes
from ulysses_infer.model.lora.attach import attach
from ulysses_infer.model.model import DTYPES, Blueprint, ShiftModel, choose_dtype, read_config
from ulysses_infer.native.matmul import make_matmul
from ulysses_infer.parallel.groups import Groups, Rendezvous, build_groups, init_distributed
from ulysses_infer.parallel.layout import check_mode
from ulysses_infer.text.prompts import PromptReader
from ulysses_infer.worker.block_tables import BlockTables
from ulysses_infer.worker.channel import Channel
from ulysses_infer.worker.cores import PinnedCores, pin
from ulysses_infer.worker.cpu_graphs import CpuGraphRunner, wants_cpu_graphs
from ulysses_infer.worker.cuda_graphs import CudaCapturer, CudaGraphRunner, wants_cuda_graphs
from ulysses_infer.worker.memory import keep_freed_memory
from ulysses_infer.worker.rank import Rank
from ulysses_infer.worker.worker import ROWS_PER_GATHER, Worker

T = TypeVar("T")


def choose_device(name: str) -> torch.device:
    """The device of this process: its own GPU by LOCAL_RANK, or the CPU. Raises `ConfigError`."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("runtime.device is cuda, but torch sees no GPU here; use cpu, or install torch for CUDA")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def set_threads(config: Config, device: torch.device, ranks_on_host: int) -> None:
    """On a CPU the ranks of a host share its cores; more threads than cores only wait for each other."""
    if config.runtime.threads_per_rank is not None:
        torch.set_num_threads(config.runtime.threads_per_rank)
    elif device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_on_host))


def _pin(config: Config, device: torch.device, channel: Channel, rank: int, ranks_on_host: int) -> PinnedCores | None:
    """Before anything large is written: memory is taken near the core that first writes it. Collective."""
    everyone = channel.gather(frozenset(os.sched_getaffinity(0)))
    if device.type != "cpu" or not config.runtime.pin_cores:
        return None
    index = int(os.environ.get("LOCAL_RANK", rank)) % ranks_on_host
    return pin(index, ranks_on_host, torch.get_num_threads(), everyone)


def start_rank(
    config: Config,
    model: GivenModel | None = None,
    progress: Progress | None = None,
    meet: Callable[[], Rendezvous] | None = None,
) -> Rank:
    """Join the group, load this rank's share, take its cache. Collective.

    `model` is one in memory to take the weights from instead of `config.model.path`. `meet` says
    where the ranks meet when no launcher's environment does. An error on any rank is raised on all of them. Raises
    `UlyssesError`s of one line.
    """
    refuse_unavailable(config)
    device = choose_device(config.runtime.device)
    choose_for_device(config, device.type)
    layout = config.parallel.layout
    for mode in config.parallel.available_modes:
        check_mode(layout, mode)
    ranks_on_host = ranks_on_this_host(layout.world_size)
    set_threads(config, device, ranks_on_host)
    if layout.world_size > 1:
        init_distributed(device, meet=meet)
    num_ranks = None if meet is None else layout.world_size
    external_group = None if model is None else model.sequence_parallel_group
    groups = build_groups(
        layout, config.parallel.available_modes, device, num_ranks, config.runtime.collectives, external_group
    )
    channel = Channel(groups)
    if device.type == "cpu":
        keep_freed_memory()
    pinned = _pin(config, device, channel, groups.rank, ranks_on_host)
    try:
        return _fill_rank(config, model, progress, channel, groups, device, ranks_on_host, pinned)
    except BaseException:
        if pinned is not None:
            pinned.release()
        raise


def _fill_rank(
    config: Config,
    model: GivenModel | None,
    progress: Progress | None,
    channel: Channel,
    groups: Groups,
    device: torch.device,
    ranks_on_host: int,
    pinned: PinnedCores | None,
) -> Rank:
    """Everything in `start_rank` that takes memory."""
    checkpoint = None if model is not None else _find_checkpoint(config, channel)
    own = channel.together(lambda: available_memory(device, config.cache.memory_utilization, ranks_on_host))
    memory = channel.smallest(own)
    blueprint = channel.together(lambda: _draw(config, model, checkpoint, groups, device, memory))
    dense = channel.together(lambda: _dense_bytes(config, model or checkpoint, blueprint, device, ranks_on_host))
    budget = channel.together(lambda: _budget(config, blueprint, dense, device, ranks_on_host))
    fuse = config.runtime.fuse and not config.lora.adapters  # adapters go through the single projections
    loaded = channel.together(lambda: blueprint.load(progress if groups.is_first else None, fuse))
    channel.together(lambda: _adapt(config, loaded, device))
    if _cache_shape(config, loaded, groups).dtype == FP8:
        channel.together(blueprint.scale_cache)
    worker = _make_worker(config, loaded, budget, channel, groups, device)
    weights = Weights(blueprint, loaded, are_borrowed=model is not None and not model.is_copied)
    return Rank(worker, channel, groups, weights, None if checkpoint is None else checkpoint.find_files(), pinned)


def _make_worker(
    config: Config, model: ShiftModel, budget: MemoryBudget, channel: Channel, groups: Groups, device: torch.device
) -> Worker:
    """Take the cache and choose the backends. Collective."""
    shape, longest = _cache_shape(config, model, groups), model.shape.max_model_len
    layers = LayerGroups.of(model.attention_options, longest)
    sizing = CacheSizing(shape, layers, longest, config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens)
    own = channel.together(lambda: cache_bytes(config.cache, sizing, budget, device.type == "cpu"))
    num_bytes = channel.smallest(own)  # equal shards, but not equally free memory
    backend = channel.together(lambda: _make_attention(config, model, shape, device))
    captures = channel.together(lambda: _captures(config, model, backend, device))
    cache = channel.together(lambda: _make_cache(config.cache, sizing, num_bytes, device, scratch_blocks=int(captures)))
    tables = BlockTables(
        config.cache.block_size, config.scheduler.max_num_seqs, shape.blocks_for(longest), layers.attention_spans
    )
    matmul = channel.together(lambda: make_matmul(config.runtime.matmul_backend, device))
    worker = Worker(model, cache, tables, groups, backend, matmul, device, config.runtime.debug)
    if captures:
        channel.together(lambda: _capture(worker, config))
    elif device.type == "cpu" and wants_cpu_graphs(config.runtime.enforce_eager, backend, matmul, shape, model.dtype):
        assert isinstance(backend, NativeAttention)
        assert matmul is not None
        worker.graphs = CpuGraphRunner(model, cache, groups, backend, matmul, config.scheduler.max_num_seqs)
    return worker


def finish_start(rank: Rank, config: Config, last: Callable[[], T]) -> tuple[T, list[int]]:
    """What rank 0 alone has left to do, then every rank's weight bytes. Collective; afterwards waits are limited."""
    done = rank.channel.together(last)
    weight_bytes = rank.channel.gather(rank.worker.model.weight_bytes)
    rank.groups.limit_waits(config.runtime.step_timeout)
    return done, weight_bytes


def _find_checkpoint(config: Config, channel: Channel) -> Checkpoint:
    """Rank 0 finds (or downloads) the checkpoint first; the others then find it in the same place or cache."""

    def find() -> Checkpoint:
        return find_checkpoint(config.model.path, config.model.revision, config.model.hf_config)

    found = channel.together(lambda: find() if channel.is_first else None)
    return channel.together(lambda: found or find())


def _adapt(config: Config, model: ShiftModel, device: torch.device) -> None:
    """Read the LoRA adapters and attach them."""
    if config.lora.adapters:
        adapters = [read_adapter(name, resolve_folder(path, None)) for name, path in config.lora.adapters.items()]
        attach(model.injection, adapters, model.dtype, device)
        model.rebind()


def _draw(
    config: Config,
    model: GivenModel | None,
    checkpoint: Checkpoint | None,
    groups: Groups,
    device: torch.device,
    memory: int,
) -> Blueprint:
    layout, shard = config.parallel.layout, groups.shard
    # Adapters may change kv_b_proj, which is not applied to latents as such.
    latent = False if config.lora.adapters else config.cache.latent
    options = {"expert_placement": config.parallel.expert_placement, "memory": memory, "latent": latent}
    if model is not None:
        return Blueprint.of_pretrained(model.module, config.model, layout, shard, device, model.open, **options)
    assert checkpoint is not None
    folder = checkpoint.find_files()
    return Blueprint.of_folder(folder, config.model, layout, shard, device, checkpoint.open, **options)


def _dense_bytes(
    config: Config,
    origin: GivenModel | Checkpoint | None,
    blueprint: Blueprint,
    device: torch.device,
    ranks_on_host: int,
) -> int:
    """What all weights but the experts' take of this rank's share of the memory."""
    dense = blueprint.weight_bytes - blueprint.expert_bytes
    assert origin is not None
    if device.type != "cpu" or config.parallel.tp > 1 or origin.is_copied or _own_dtype(origin) != blueprint.dtype:
        return dense
    # Whole tensors as they are: views of the caller's model, or pages of the files, which the ranks of a host share.
    return 0 if isinstance(origin, GivenModel) else dense // ranks_on_host


def _own_dtype(origin: GivenModel | Checkpoint) -> torch.dtype:
    """The dtype that the weights have where they come from."""
    if isinstance(origin, GivenModel):
        own: torch.dtype = origin.module.dtype
        return own
    return choose_dtype("auto", read_config(origin.find_files()))


def _budget(
    config: Config, blueprint: Blueprint, dense_bytes: int, device: torch.device, ranks_on_host: int
) -> MemoryBudget:
    shape, scheduler = blueprint.shape, config.scheduler
    vocab_share = -(-shape.vocab_size // config.parallel.world_size)
    rows = min(max(scheduler.max_num_seqs, ROWS_PER_GATHER), scheduler.max_num_batched_tokens)
    budget = MemoryBudget(
        available=available_memory(device, config.cache.memory_utilization, ranks_on_host),
        weights=blueprint.expert_bytes
        + dense_bytes
        + sum(stored_bytes(resolve_folder(path, None)) for path in config.lora.adapters.values()),
        activations=activation_bytes(
            scheduler.max_num_batched_tokens,
            shape.hidden_size,
            shape.intermediate_size,
            vocab_share,
            rows,
            blueprint.dtype.itemsize,
        )
        + (PAGE_BYTES if shape.values_in_keys else 0),
    )
    check_weights_fit(budget)
    return budget


def _cache_shape(config: Config, model: ShiftModel, groups: Groups) -> CacheShape:
    sizes = model.shape
    return CacheShape(
        num_layers=sizes.num_layers,
        num_key_value_heads=sizes.key_value_heads_of(groups.shard, groups.layout),
        key_width=sizes.key_width,
        value_width=sizes.value_width,
        block_size=config.cache.block_size,
        dtype={"auto": model.dtype, "fp8": FP8, **DTYPES}[config.cache.dtype],
        values_in_keys=sizes.values_in_keys,
    )


def _make_attention(config: Config, model: ShiftModel, shape: CacheShape, device: torch.device) -> AttentionBackend:
    if device.type == "cpu":
        return make_backend(config.runtime.attention_backend, device)
    needs = AttentionNeeds.of(
        model.attention_options,
        model.shape.max_model_len,
        torch.cuda.get_device_capability(device),
        model.dtype,
        shape.dtype,
        shape.key_width,
        shape.value_width,
        shape.block_size,
        shape.values_in_keys,
    )
    return make_gpu_backend(config.runtime.attention_backend, device, needs)


def _captures(config: Config, model: ShiftModel, backend: AttentionBackend, device: torch.device) -> bool:
    return wants_cuda_graphs(config.runtime.enforce_eager, device, backend, bool(model.injection.expert_layers))


def _capture(worker: Worker, config: Config) -> None:
    """Capture the decode steps of every mode. Collective."""
    assert isinstance(worker.backend, KernelAttention)
    most = min(config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens)
    worker.graphs = CudaGraphRunner(
        worker.model,
        worker.cache,
        worker.groups,
        worker.backend,
        worker.inputs,
        CudaCapturer(worker.device),
        worker.device,
        most,
    )
    worker.graphs.capture_all()


def _make_cache(
    config: CacheConfig, sizing: CacheSizing, num_bytes: int, device: torch.device, scratch_blocks: int
) -> PagedCache:
    if config.num_blocks is not None:
        num_blocks = sizing.with_first(config.num_blocks)
    else:
        num_blocks = sizing.fitting(num_bytes, all_of_it=config.memory_bytes is not None)
        sizing.check_fits_one_request(num_blocks)
    return PagedCache(sizing.shape, num_blocks, device, scratch_blocks, sizing.groups)


def make_prompt_reader(config: Config, rank: Rank, tokenizer: Any, model: GivenModel | None = None) -> PromptReader:
    """What turns prompts into token ids for the loaded model. `model`: the one given in memory, if one was."""
    loaded = rank.worker.model
    eos = eos_token_ids(rank.folder, None if model is None else model.module, loaded.injection.config, tokenizer)
    return PromptReader(tokenizer, loaded.shape.vocab_size, eos, config.model.seed)


def eos_token_ids(folder: Path | None, model: Any, config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the generation config's, else the model config's, else the tokenizer's."""
    generation = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if folder is not None and (folder / "generation_config.json").is_file():
        generation = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    for ids in (generation, getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()
