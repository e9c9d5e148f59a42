"""Bring one rank up: device, groups, weights, cache. Every rank runs this with the same configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from ulysses_infer.attention.backend import make_backend
from ulysses_infer.cache.budget import (
    MemoryBudget,
    activation_bytes,
    available_memory,
    check_weights_fit,
    num_cache_blocks,
)
from ulysses_infer.cache.paged import CacheShape, PagedCache, check_fits_one_request
from ulysses_infer.config import Config, refuse_unavailable
from ulysses_infer.engine.channel import Channel
from ulysses_infer.engine.tables import BlockTables
from ulysses_infer.engine.worker import ROWS_PER_GATHER, Worker
from ulysses_infer.errors import UlyssesError
from ulysses_infer.model.checkpoint import Progress
from ulysses_infer.model.files import resolve_folder
from ulysses_infer.model.model import DTYPES, Blueprint, ShiftModel, shard_key_value_heads
from ulysses_infer.parallel.groups import Groups, build_groups, init_distributed
from ulysses_infer.parallel.layout import check_mode

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """One rank, ready to run steps."""

    worker: Worker
    channel: Channel
    groups: Groups
    folder: Path | None
    """The checkpoint folder, where the tokenizer is too; None for a model given in memory."""


def choose_device(name: str) -> torch.device:
    """The device of this process: its own GPU by LOCAL_RANK, or the CPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def set_threads(config: Config, device: torch.device, ranks_on_host: int) -> None:
    """On a CPU the ranks of a host share its cores; more threads than cores only wait for each other."""
    if config.runtime.threads_per_rank is not None:
        torch.set_num_threads(config.runtime.threads_per_rank)
    elif device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_on_host))


def start_rank(config: Config, model: Any = None, progress: Progress | None = None) -> Rank:
    """Join the group, load this rank's share, take its cache. Collective.

    `model` is a `transformers.PreTrainedModel` to take the weights from instead of `config.model.path`. An error on
    any rank is raised on all of them. Raises `UlyssesError`s of one line.
    """
    refuse_unavailable(config)
    device = choose_device(config.runtime.device)
    layout = config.parallel.layout
    for mode in config.parallel.available_modes:
        check_mode(layout, mode)
    ranks_on_host = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or layout.world_size)
    set_threads(config, device, ranks_on_host)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or layout.world_size > 1:
        init_distributed(device, timedelta(seconds=config.runtime.step_timeout))
    groups = build_groups(layout, config.parallel.available_modes, device)
    channel = Channel(groups.control, groups.is_first)
    folder = None if model is not None else _together(channel, lambda: _find_folder(config, groups, channel))
    blueprint = _together(channel, lambda: _draw(config, model, folder, groups, device))
    budget = _together(channel, lambda: _budget(config, blueprint, device, ranks_on_host))
    loaded = _together(channel, lambda: blueprint.load(progress if groups.is_first else None))
    cache = _together(channel, lambda: _make_cache(config, loaded, groups, budget, device, channel))
    tables = BlockTables(
        config.cache.block_size, config.scheduler.max_num_seqs, cache.shape.blocks_for(loaded.shape.max_model_len)
    )
    backend = _together(channel, lambda: make_backend(config.runtime.attention_backend, device))
    worker = Worker(loaded, cache, tables, groups, backend, device, config.runtime.debug)
    return Rank(worker, channel, groups, folder)


def _together(channel: Channel, phase: Callable[[], T]) -> T:
    """Run a phase on every rank; if it fails on any, all raise the same error, so that none waits for a lost one."""
    error: Exception | None = None
    result: T | None = None
    try:
        result = phase()
    except (UlyssesError, OSError, RuntimeError, ValueError) as raised:
        error = raised
    channel.agree(error)
    assert error is None
    return result  # type: ignore[return-value]


def _find_folder(config: Config, groups: Groups, channel: Channel) -> Path:
    """Rank 0 finds (or downloads) the checkpoint first; the others then find it in the same place or cache."""
    folder = resolve_folder(config.model.path, config.model.revision) if groups.is_first else None
    channel.gather(None)
    return folder or resolve_folder(config.model.path, config.model.revision)


def _draw(config: Config, model: Any, folder: Path | None, groups: Groups, device: torch.device) -> Blueprint:
    layout, shard = config.parallel.layout, groups.shard
    if model is not None:
        return Blueprint.of_pretrained(model, config.model, layout, shard, device)
    assert folder is not None
    return Blueprint.of_folder(folder, config.model, layout, shard, device)


def _budget(config: Config, blueprint: Blueprint, device: torch.device, ranks_on_host: int) -> MemoryBudget:
    shape, scheduler = blueprint.shape, config.scheduler
    vocab_share = -(-shape.vocab_size // config.parallel.world_size)
    rows = min(max(scheduler.max_num_seqs, ROWS_PER_GATHER), scheduler.max_num_batched_tokens)
    # On one host without a GPU, ranks that keep whole tensors map the same file pages.
    shares = device.type == "cpu" and config.parallel.tp == 1
    budget = MemoryBudget(
        available=available_memory(device, config.cache.memory_utilization, ranks_on_host),
        weights=blueprint.weight_bytes // (ranks_on_host if shares else 1),
        activations=activation_bytes(
            scheduler.max_num_batched_tokens, shape.hidden_size, shape.intermediate_size, vocab_share, rows,
            blueprint.dtype.itemsize,
        ),
    )  # fmt: skip
    check_weights_fit(budget)
    return budget


def _make_cache(
    config: Config, model: ShiftModel, groups: Groups, budget: MemoryBudget, device: torch.device, channel: Channel
) -> PagedCache:
    sizes = model.shape
    shape = CacheShape(
        num_layers=sizes.num_layers,
        num_key_value_heads=shard_key_value_heads(sizes, groups.layout, groups.shard),
        key_width=sizes.key_width,
        value_width=sizes.value_width,
        block_size=config.cache.block_size,
        dtype=model.dtype if config.cache.dtype == "auto" else DTYPES[config.cache.dtype],
    )
    most = config.scheduler.max_num_seqs * shape.blocks_for(sizes.max_model_len)
    error: Exception | None = None
    num_blocks = 0
    try:
        num_blocks = num_cache_blocks(config.cache, shape, budget, most, device.type == "cpu")
    except UlyssesError as raised:
        error = raised
    channel.agree(error)
    num_blocks = channel.smallest(num_blocks)  # equal shards, but not equally free memory
    if config.cache.num_blocks is None:
        check_fits_one_request(num_blocks, shape, sizes.max_model_len)
    return PagedCache(shape, num_blocks, device)


def eos_token_ids(folder: Path | None, model: Any, config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the generation config's, else the model config's, else the tokenizer's."""
    generation = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if folder is not None and (folder / "generation_config.json").is_file():
        generation = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    for ids in (generation, config.eos_token_id, getattr(tokenizer, "eos_token_id", None)):
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()
