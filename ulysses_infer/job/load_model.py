"""Loads this rank's share of a model: finds the checkpoint, budgets the memory, reads the weights and adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.attention.index import SCRATCH_BYTES
from ulysses_infer.cache.budget import MemoryBudget, activation_bytes, available_memory, check_weights_fit
from ulysses_infer.cache.paged import FP8
from ulysses_infer.config import Config
from ulysses_infer.job.make_worker import cache_shape
from ulysses_infer.model.layers.latent_chunks import MAX_EXPANDED_BYTES
from ulysses_infer.model.loading.checkpoint import Progress
from ulysses_infer.model.loading.files import resolve_folder
from ulysses_infer.model.loading.sources import Checkpoint, GivenModel, find_checkpoint
from ulysses_infer.model.loading.weights import Weights
from ulysses_infer.model.lora.adapter import adapter_bytes, read_adapter
from ulysses_infer.model.lora.attach import attach_adapter, check_adapter
from ulysses_infer.model.model import ModelBuilder, ShiftModel, choose_dtype, read_config
from ulysses_infer.model.shape import ModelShape
from ulysses_infer.parallel.groups import ProcessGroups
from ulysses_infer.worker.channel import Channel
from ulysses_infer.worker.worker import ROWS_PER_GATHER


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, and what is known of its memory."""

    model: ShiftModel
    weights: Weights
    budget: MemoryBudget
    folder: Path | None
    """The folder of the checkpoint's config; None for a model given in memory."""


def load_model(
    config: Config,
    given: GivenModel | None,
    progress: Progress | None,
    channel: Channel,
    groups: ProcessGroups,
    device: torch.device,
    ranks_on_host: int,
    checkpoint: Checkpoint | None = None,
    available: int | None = None,
) -> LoadedModel:
    """Load the weights of `given`, or of the checkpoint at `config.model.path`. Collective.

    progress: called on rank 0. checkpoint: the one to load, if it is known. available: bytes that this rank may use;
    None measures them. Raises `CheckpointError`, `ConfigError` or `UnsupportedModelError`, on all ranks alike.
    """
    if given is None and checkpoint is None:
        checkpoint = _find_checkpoint(config, channel)
    own = available or channel.together(
        lambda: available_memory(device, config.cache.memory_utilization, ranks_on_host)
    )
    memory = channel.smallest(own)
    blueprint = channel.together(lambda: make_blueprint(config, given, checkpoint, groups, device, memory))
    dense = channel.together(lambda: _dense_bytes(config, given or checkpoint, blueprint, device, ranks_on_host))
    budget = channel.together(lambda: _make_budget(config, blueprint, dense, own))
    fuse = config.runtime.fuse and not config.lora.is_used  # adapters apply to the separate projections
    model = channel.together(lambda: blueprint.load(progress if groups.is_first else None, fuse))
    channel.together(lambda: _attach_adapters(config, model, device))
    if cache_shape(config, model, groups).dtype == FP8:
        channel.together(blueprint.load_cache_scales)
    weights = Weights(blueprint, model, are_borrowed=given is not None and not given.is_copied)
    return LoadedModel(model, weights, budget, None if checkpoint is None else checkpoint.find_files())


def _find_checkpoint(config: Config, channel: Channel) -> Checkpoint:
    """Rank 0 finds or downloads the checkpoint first; the others then find it in the same place or cache."""

    def find() -> Checkpoint:
        return find_checkpoint(config.model.path, config.model.revision, config.model.hf_config, config.model.dtype)

    found = channel.together(lambda: find() if channel.is_first else None)
    return channel.together(lambda: found or find())


def make_blueprint(
    config: Config,
    given: GivenModel | None,
    checkpoint: Checkpoint | None,
    groups: ProcessGroups,
    device: torch.device,
    memory: int,
) -> ModelBuilder:
    """What this rank will store of `given` or `checkpoint`. memory: bytes on the rank with the least of it."""
    layout, shard = config.parallel.layout, groups.shard
    # Adapters may change kv_b_proj, which is not applied as a layer when latents are cached.
    latent = False if config.lora.is_used else config.cache.latent
    options = {"expert_placement": config.parallel.expert_placement, "memory": memory, "latent": latent}
    if given is not None:
        return ModelBuilder.from_pretrained(given.module, config.model, layout, shard, device, given.open, **options)
    assert checkpoint is not None
    folder = checkpoint.find_files()
    return ModelBuilder.from_folder(folder, config.model, layout, shard, device, checkpoint.open, **options)


def _dense_bytes(
    config: Config,
    origin: GivenModel | Checkpoint | None,
    blueprint: ModelBuilder,
    device: torch.device,
    ranks_on_host: int,
) -> int:
    """Memory that the weights other than the experts' take of this rank's share."""
    dense = blueprint.weight_bytes - blueprint.expert_bytes
    assert origin is not None
    is_copied = origin.is_copied or config.model.quantize is not None
    if device.type != "cpu" or config.parallel.tp > 1 or is_copied or _own_dtype(origin) != blueprint.dtype:
        return dense
    # Whole tensors are not copied: they are views of the given model, or file pages that the ranks of a host share.
    return 0 if isinstance(origin, GivenModel) else dense // ranks_on_host


def _own_dtype(origin: GivenModel | Checkpoint) -> torch.dtype:
    """The dtype of the weights at their origin."""
    if isinstance(origin, GivenModel):
        own: torch.dtype = origin.module.dtype
        return own
    return choose_dtype("auto", read_config(origin.find_files()))


def _make_budget(config: Config, blueprint: ModelBuilder, dense_bytes: int, available: int) -> MemoryBudget:
    """What is available, and what weights and activations take of it. Raises `ConfigError` if weights do not fit."""
    shape, scheduler = blueprint.shape, config.scheduler
    rows = min(max(scheduler.max_num_seqs, ROWS_PER_GATHER), scheduler.max_num_batched_tokens)
    activations = step_bytes(config, shape, blueprint.dtype, scheduler.max_num_batched_tokens, rows)
    adapters = sum(adapter_bytes(resolve_folder(path, None)) for path in config.lora.adapters.values())
    adapters += config.lora.runtime_bytes
    budget = MemoryBudget(
        available=available,
        weights=blueprint.expert_bytes + dense_bytes + adapters,
        activations=activations + (MAX_EXPANDED_BYTES if shape.values_in_keys else 0),
    )
    check_weights_fit(budget)
    return budget


def step_bytes(config: Config, shape: ModelShape, dtype: torch.dtype, num_tokens: int, num_rows: int) -> int:
    """Upper bound of the temporary tensors of a step of `num_tokens` tokens, with logits of `num_rows` of them."""
    share = ceil_div(shape.vocab_size, config.parallel.world_size)
    sizes = num_tokens, shape.residual_width, shape.intermediate_size, share, num_rows, dtype.itemsize
    return activation_bytes(*sizes) + (SCRATCH_BYTES if shape.has_index else 0)


def _attach_adapters(config: Config, model: ShiftModel, device: torch.device) -> None:
    for number, (name, path) in enumerate(config.lora.adapters.items(), start=1):
        adapter = read_adapter(name, resolve_folder(path, None))
        check_adapter(model.injection, adapter)
        attach_adapter(model.injection, adapter, number, model.dtype, device)
    model.bind_again()
