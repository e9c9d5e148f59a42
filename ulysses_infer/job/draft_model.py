"""Brings up the model that drafts tokens for the served one: its weights, its cache and their share of the memory."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch

from ulysses_infer.attention.backend import AttentionBackend
from ulysses_infer.cache.budget import CPU_CACHE_LIMIT, MemoryBudget
from ulysses_infer.cache.sizing import CacheSizing
from ulysses_infer.config import CacheConfig, Config, ModelConfig, SpeculationConfig
from ulysses_infer.config.schema import LoraConfig, ParallelConfig
from ulysses_infer.config.speculation import DRAFT_MODEL
from ulysses_infer.errors import ConfigError, UlyssesError
from ulysses_infer.job.load_model import LoadedModel, load_model
from ulysses_infer.job.make_worker import cache_sizing, make_worker
from ulysses_infer.model.loading.sources import Checkpoint
from ulysses_infer.parallel.groups import ProcessGroups, build_groups
from ulysses_infer.text.prompts import load_tokenizer
from ulysses_infer.text.same_tokens import check_same_tokens
from ulysses_infer.worker.channel import Channel
from ulysses_infer.worker.drafting.draft_model import DraftModel
from ulysses_infer.worker.graphs.cuda_graphs import Capturer


@dataclass(frozen=True)
class LoadedDraft:
    """The weights of the draft model on this rank."""

    config: Config
    """See `draft_recipe`."""
    loaded: LoadedModel
    groups: ProcessGroups
    channel: Channel
    num_bytes: int
    """Bytes of its weights, activations and cache on this rank."""

    def make(
        self, device: torch.device, capturer: Capturer | None = None, backend: AttentionBackend | None = None
    ) -> DraftModel:
        """Allocate its cache and choose its kernels. Collective; capturer, backend: as of `make_worker`."""
        loaded = self.loaded
        return DraftModel(
            make_worker(self.config, loaded.model, loaded.budget, self.channel, self.groups, device, capturer, backend)
        )


def load_draft(
    config: Config,
    target: LoadedModel,
    channel: Channel,
    groups: ProcessGroups,
    device: torch.device,
    ranks_on_host: int,
    checkpoint: Checkpoint | None = None,
) -> LoadedDraft | None:
    """Load `speculation.model` into what `target`, the served model, leaves of the memory. Collective.

    None on ranks without a part of it, or if the recipe has no draft model. checkpoint: the one to load, if it is
    known. Raises `UlyssesError`s of one line, on all ranks alike.
    """
    if config.speculation.method != DRAFT_MODEL:
        return None
    if config.speculation.draft_ranks == "all":
        return channel.together(
            lambda: _load(config, target, channel, groups, groups, device, ranks_on_host, checkpoint)
        )

    def load_alone() -> LoadedDraft | None:
        if not groups.is_first:
            return None
        alone = ParallelConfig()
        own = build_groups(alone.layout, alone.available_modes, device, num_ranks=1)
        return _load(config, target, Channel(own), own, groups, device, 1, checkpoint)

    return channel.together(load_alone)


def _load(
    config: Config,
    target: LoadedModel,
    channel: Channel,
    groups: ProcessGroups,
    target_groups: ProcessGroups,
    device: torch.device,
    ranks_on_host: int,
    checkpoint: Checkpoint | None,
) -> LoadedDraft:
    """channel, groups: of the ranks that hold the draft model; target_groups: of those that hold the served one."""
    own = draft_recipe(config)
    try:
        loaded = load_model(
            own, None, None, channel, groups, device, ranks_on_host, checkpoint, available=max(1, target.budget.left)
        )
        channel.together(lambda: _check(config, own, target, loaded))
        own.cache.num_blocks = channel.smallest(
            num_draft_blocks(
                config.cache,
                cache_sizing(config, target.model, target_groups),
                cache_sizing(own, loaded.model, groups),
                loaded.budget.left,
                device.type == "cpu",
            )
        )
    except UlyssesError as error:
        raise type(error)(f"speculation.model = {config.speculation.model!r}: {error}") from error
    sizing, budget = cache_sizing(own, loaded.model, groups), loaded.budget
    cache_bytes = sizing.num_bytes(sizing.blocks_per_group(own.cache.num_blocks))
    return LoadedDraft(own, loaded, groups, channel, budget.weights + budget.activations + cache_bytes)


def draft_recipe(config: Config) -> Config:
    """The recipe of the draft model: the served model's, with other model and cache."""
    own = copy.deepcopy(config)
    assert config.speculation.model is not None
    own.model = ModelConfig(
        path=config.speculation.model,
        quantize=config.speculation.quantize,
        trust_remote_code=config.model.trust_remote_code,
        allow_unverified=config.model.allow_unverified,
    )
    own.speculation, own.lora = SpeculationConfig(), LoraConfig()
    own.cache.dtype, own.cache.memory_bytes, own.runtime.attention_backend = "auto", None, "auto"
    if config.speculation.draft_ranks != "all":
        own.parallel = ParallelConfig(expert_placement=config.parallel.expert_placement)
    return own


def _check(config: Config, own: Config, target: LoadedModel, loaded: LoadedModel) -> None:
    """Raise `ConfigError` for a model that cannot draft for `target`; limit the length of its texts to the target's."""
    model, kind = loaded.model, loaded.model.injection.config.model_type
    if model.state_shapes or model.shape.entries:
        kept = "states of recurrent layers" if model.state_shapes else "entries of several tokens"
        raise ConfigError(f"model type {kind!r} keeps {kept}, which cannot go back to the accepted tokens; use another")
    check_same_tokens(
        (load_tokenizer(config.model, target.folder), target.model.shape.vocab_size),
        (load_tokenizer(own.model, loaded.folder), model.shape.vocab_size),
    )
    longest = min(model.shape.max_model_len, target.model.shape.max_model_len)
    model.shape = dataclasses.replace(model.shape, max_model_len=longest)


def num_draft_blocks(config: CacheConfig, target: CacheSizing, draft: CacheSizing, left: int, on_cpu: bool) -> int:
    """Blocks of the draft model's cache: as many tokens as the cache of the served model has, as far as `left` bytes
    hold both."""
    if config.num_blocks is not None:
        return config.num_blocks
    served, own = (sizing.num_bytes([1] * len(sizing.groups.attention_spans)) for sizing in (target, draft))
    count = left // max(1, served + own)
    most = config.memory_bytes if config.memory_bytes is not None else CPU_CACHE_LIMIT if on_cpu else None
    if most is not None:
        count = min(count, most // max(1, served))
    return draft.blocks_within(count * own)[0]


def without_draft(budget: MemoryBudget, draft: LoadedDraft | None) -> MemoryBudget:
    """What the draft model leaves of `budget`."""
    return budget if draft is None else dataclasses.replace(budget, draft=draft.num_bytes)
