"""Bring one rank up: device, groups, weights, cache. Every rank runs this with the same configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
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
from ulysses_infer.engine.prompts import PromptReader
from ulysses_infer.engine.tables import BlockTables
from ulysses_infer.engine.worker import ROWS_PER_GATHER, Worker
from ulysses_infer.errors import ConfigError
from ulysses_infer.model.checkpoint import Progress
from ulysses_infer.model.files import resolve_folder
from ulysses_infer.model.model import DTYPES, Blueprint, ShiftModel
from ulysses_infer.parallel.groups import Groups, Rendezvous, build_groups, init_distributed
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


def start_rank(
    config: Config, model: Any = None, progress: Progress | None = None,
    meet: Callable[[], Rendezvous] | None = None,
) -> Rank:  # fmt: skip
    """Join the group, load this rank's share, take its cache. Collective.

    `model` is a `transformers.PreTrainedModel` to take the weights from instead of `config.model.path`. `meet` says
    where the ranks meet when no launcher's environment does. An error on any rank is raised on all of them. Raises
    `UlyssesError`s of one line.
    """
    refuse_unavailable(config)
    device = choose_device(config.runtime.device)
    layout = config.parallel.layout
    for mode in config.parallel.available_modes:
        check_mode(layout, mode)
    ranks_on_host = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or layout.world_size)
    set_threads(config, device, ranks_on_host)
    if layout.world_size > 1:
        init_distributed(device, meet=meet)
    num_ranks = None if meet is None else layout.world_size
    groups = build_groups(layout, config.parallel.available_modes, device, num_ranks)
    channel = Channel(groups)
    folder = None if model is not None else _find_folder(config, channel)
    blueprint = channel.together(lambda: _draw(config, model, folder, groups, device))
    budget = channel.together(lambda: _budget(config, blueprint, device, ranks_on_host))
    loaded = channel.together(lambda: blueprint.load(progress if groups.is_first else None))
    shape = _cache_shape(config, loaded, groups)
    most = config.scheduler.max_num_seqs * shape.blocks_for(loaded.shape.max_model_len)
    fitting = channel.together(lambda: num_cache_blocks(config.cache, shape, budget, most, device.type == "cpu"))
    num_blocks = channel.smallest(fitting)  # equal shards, but not equally free memory
    cache = channel.together(lambda: _make_cache(config, shape, num_blocks, loaded.shape.max_model_len, device))
    tables = BlockTables(
        config.cache.block_size, config.scheduler.max_num_seqs, cache.shape.blocks_for(loaded.shape.max_model_len)
    )
    backend = channel.together(lambda: make_backend(config.runtime.attention_backend, device))
    worker = Worker(loaded, cache, tables, groups, backend, device, config.runtime.debug)
    return Rank(worker, channel, groups, folder)


def finish_start(rank: Rank, config: Config, last: Callable[[], T]) -> tuple[T, list[int]]:
    """What rank 0 alone has left to do, then every rank's weight bytes. Collective; afterwards waits are limited."""
    done = rank.channel.together(last)
    weight_bytes = rank.channel.gather(rank.worker.model.weight_bytes)
    rank.groups.limit_waits(config.runtime.step_timeout)
    return done, weight_bytes


def _find_folder(config: Config, channel: Channel) -> Path:
    """Rank 0 finds (or downloads) the checkpoint first; the others then find it in the same place or cache."""

    def find() -> Path:
        return resolve_folder(config.model.path, config.model.revision)

    found = channel.together(lambda: find() if channel.is_first else None)
    return channel.together(lambda: found or find())


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


def _cache_shape(config: Config, model: ShiftModel, groups: Groups) -> CacheShape:
    sizes = model.shape
    return CacheShape(
        num_layers=sizes.num_layers,
        num_key_value_heads=sizes.key_value_heads_of(groups.shard, groups.layout),
        key_width=sizes.key_width,
        value_width=sizes.value_width,
        block_size=config.cache.block_size,
        dtype=model.dtype if config.cache.dtype == "auto" else DTYPES[config.cache.dtype],
    )


def _make_cache(
    config: Config, shape: CacheShape, num_blocks: int, max_model_len: int, device: torch.device
) -> PagedCache:
    if config.cache.num_blocks is None:
        check_fits_one_request(num_blocks, shape, max_model_len)
    return PagedCache(shape, num_blocks, device)


def make_prompt_reader(config: Config, rank: Rank, tokenizer: Any, model: Any = None) -> PromptReader:
    """What turns prompts into token ids for the loaded model. `model`: the one given in memory, if one was."""
    loaded = rank.worker.model
    eos = eos_token_ids(rank.folder, model, loaded.injection.config, tokenizer)
    return PromptReader(tokenizer, loaded.shape.vocab_size, eos, config.model.seed)


def eos_token_ids(folder: Path | None, model: Any, config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the generation config's, else the model config's, else the tokenizer's."""
    generation = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if folder is not None and (folder / "generation_config.json").is_file():
        generation = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    for ids in (generation, config.eos_token_id, getattr(tokenizer, "eos_token_id", None)):
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()
