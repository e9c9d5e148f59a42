"""Brings up a head that drafts tokens for the served model: multi-token prediction, or EAGLE-3."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ulysses_infer.cache.budget import MemoryBudget
from ulysses_infer.cache.groups import CacheGroups
from ulysses_infer.cache.paged import PagedCache
from ulysses_infer.config import Config
from ulysses_infer.config.speculation import EAGLE3, HEADS
from ulysses_infer.errors import CheckpointError, ConfigError
from ulysses_infer.job.load_model import LoadedModel
from ulysses_infer.job.make_worker import cache_shape, make_attention
from ulysses_infer.model.draft_heads.builders import eagle3_builder, mtp_builder
from ulysses_infer.model.draft_heads.head import DraftHead, HeadBuilder
from ulysses_infer.model.hidden_states import HiddenStates
from ulysses_infer.model.loading.files import resolve_folder
from ulysses_infer.parallel.groups import ProcessGroups
from ulysses_infer.worker.channel import Channel
from ulysses_infer.worker.drafting.chain_tables import scratch_blocks_per_sequence
from ulysses_infer.worker.drafting.head_drafter import HeadDrafter
from ulysses_infer.worker.worker import Worker


@dataclass(frozen=True)
class LoadedHead:
    """The head's share on this rank."""

    config: Config
    head: DraftHead
    hidden: HiddenStates
    groups: ProcessGroups

    def make(self, worker: Worker, device: torch.device) -> HeadDrafter:
        """Allocate its cache, beside that of `worker`, which it observes from now on. Raises `ConfigError`."""
        config, head, longest = self.config, self.head, self.head.shape.max_model_len
        num_blocks, most = worker.cache.blocks_of_groups[0], config.speculation.max_drafted
        shape, own_groups = cache_shape(config, head, self.groups), CacheGroups.of(head.attention_options, longest)
        cache = PagedCache(shape, num_blocks + self._scratch_blocks, device, groups=own_groups)
        backend = make_attention(config.runtime.attention_backend, head, shape, device)
        drafter = HeadDrafter(head, self.hidden, cache, self.groups, backend, worker.matmul, num_blocks, most)
        worker.observer = drafter
        return drafter

    @property
    def _scratch_blocks(self) -> int:
        """Blocks of drafted tokens, which no request owns."""
        config = self.config
        each = scratch_blocks_per_sequence(config.cache.block_size, config.speculation.max_drafted)
        return config.scheduler.max_num_seqs * each

    def within(self, budget: MemoryBudget, served: LoadedModel) -> MemoryBudget:
        """What the head's weights, and its blocks beside those of `served`, leave of `budget`."""
        shape, own = (cache_shape(self.config, model, self.groups) for model in (served.model, self.head))
        fixed = self.head.weight_bytes + self.hidden.num_bytes + self._scratch_blocks * own.bytes_per_block
        share = own.bytes_per_block / (own.bytes_per_block + shape.bytes_per_block)
        blocks = int(max(0, budget.left - fixed) * share)
        return dataclasses.replace(budget, draft=budget.draft + fixed + blocks)


def load_head(
    config: Config, served: LoadedModel, channel: Channel, groups: ProcessGroups, device: torch.device
) -> LoadedHead | None:
    """Load the head that the recipe asks for; None if it asks for none. Collective.

    Raises `UlyssesError`s of one line, on all ranks alike, for a head that does not fit the served model.
    """
    if config.speculation.method not in HEADS:
        return None
    builder = channel.together(_builder_of(config, served))
    head = channel.together(lambda: builder.load(config.runtime.fuse))
    rows = config.scheduler.max_num_batched_tokens + groups.layout.world_size
    model = served.model
    hidden = HiddenStates(builder.layers, rows, model.shape.hidden_size, model.dtype, device)
    model.keep_hidden(hidden)
    return LoadedHead(config, head, hidden, groups)


def _folder_of(config: Config) -> Path:
    """The folder of `speculation.model`. Raises `CheckpointError`."""
    path = config.speculation.model
    assert path is not None
    try:
        return resolve_folder(path, None)
    except CheckpointError as error:
        raise CheckpointError(f"speculation.model = {path!r} cannot be loaded: {error}") from error


def _builder_of(config: Config, served: LoadedModel) -> Callable[[], HeadBuilder]:
    model, method = served.model, config.speculation.method
    first = CacheGroups.of(model.attention_options, model.shape.max_model_len).attention_spans[0]

    def build() -> HeadBuilder:
        if first.is_limited:
            raise ConfigError(
                f"speculation.method = {method!r}: all layers of model type {model.injection.config.model_type!r} have "
                "limited attention spans, so that blocks of the head's cache would be freed; use ngram or suffix"
            )
        if model.skips_tokens:
            raise ConfigError(
                f"speculation.method = {method!r}: prompts skip the later layers of model type "
                f"{model.injection.config.model_type!r}, so that their tokens lack the hidden states that a head "
                "reads; use ngram, suffix or draft_model"
            )
        if method == EAGLE3:
            return eagle3_builder(model, _folder_of(config))
        return mtp_builder(model, config.model, served.weights.open_source(), config.cache.latent)

    return build
