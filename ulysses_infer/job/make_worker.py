"""Makes a rank's worker: allocates the KV cache, chooses the kernels, and captures or records decode steps."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ulysses_infer.attention.backend import AttentionBackend, KernelAttention
from ulysses_infer.attention.native import NativeAttention
from ulysses_infer.attention.selection import AttentionNeeds, make_backend, make_gpu_backend
from ulysses_infer.cache.budget import MemoryBudget, cache_bytes
from ulysses_infer.cache.groups import CacheGroups
from ulysses_infer.cache.paged import FP8, CacheShape, PagedCache
from ulysses_infer.cache.sizing import CacheSizing
from ulysses_infer.cache.state_sizing import StateSizing
from ulysses_infer.cache.states import StateCache, slot_bytes
from ulysses_infer.config import CacheConfig, Config
from ulysses_infer.config.speculation import HEADS
from ulysses_infer.errors import ConfigError
from ulysses_infer.kernels.launch import capability
from ulysses_infer.model.experts import host_reads
from ulysses_infer.model.model import DTYPES, ShiftModel
from ulysses_infer.native.matmul import NativeMatmul, make_matmul
from ulysses_infer.parallel.groups import ProcessGroups
from ulysses_infer.worker.block_tables import BlockTables
from ulysses_infer.worker.channel import Channel
from ulysses_infer.worker.graphs.cpu_graphs import CpuGraphRunner, wants_cpu_graphs
from ulysses_infer.worker.graphs.cpu_mixed_graphs import SMALLEST, CpuMixedGraphRunner
from ulysses_infer.worker.graphs.cuda_graphs import Capturer, CudaCapturer, CudaGraphRunner, wants_cuda_graphs
from ulysses_infer.worker.graphs.cuda_mixed_graphs import MixedGraphRunner
from ulysses_infer.worker.worker import Worker

logger = logging.getLogger(__name__)


def make_worker(
    config: Config,
    model: ShiftModel,
    budget: MemoryBudget,
    channel: Channel,
    groups: ProcessGroups,
    device: torch.device,
    capturer: Capturer | None = None,
    backend: AttentionBackend | None = None,
) -> Worker:
    """The worker of this rank, ready to run steps. Collective. Raises `ConfigError`, on all ranks alike.

    capturer: of decode steps, if they are captured; None: CUDA's. backend: attention; None: as the recipe says.
    """
    sizing = cache_sizing(config, model, groups)
    shape, layers, max_model_len = sizing.shape, sizing.groups, sizing.max_model_len
    own = channel.together(lambda: cache_bytes(config.cache, sizing, budget, device.type == "cpu"))
    num_bytes = channel.smallest(own)  # shards are equal, free memory may not be
    attention = backend or channel.together(
        lambda: make_attention(config.runtime.attention_backend, model, shape, device)
    )
    reads = host_reads(model.injection.expert_layers, device)
    wanted = channel.together(lambda: wants_cuda_graphs(config.runtime.enforce_eager, device, attention, reads))
    captures = bool(channel.smallest(int(wanted)))  # all ranks capture, or none
    left = channel.smallest(budget.left) - num_bytes
    states = channel.together(lambda: make_states(config, model, sizing, num_bytes, left, device, int(captures)))
    if states is not None:
        _limit_sequences(config, states, channel.is_first)
        sizing = replace(sizing, max_num_seqs=states.num_sequences)
        num_bytes -= 0 if config.cache.num_blocks is not None else states.num_bytes
    matmul = channel.together(lambda: make_matmul(config.runtime.matmul_backend, device))
    on_cpu = device.type == "cpu" and not captures
    records = on_cpu and wants_cpu_graphs(config.runtime.enforce_eager, attention, matmul, shape, model.dtype)
    most_recorded = channel.smallest(_most_recorded_tokens(config, model, shape, attention) if records else 0)
    scratch_blocks = int(captures or most_recorded > 0)
    cache = channel.together(lambda: _make_cache(config.cache, sizing, num_bytes, device, scratch_blocks))
    tables = BlockTables(
        config.cache.block_size, config.scheduler.max_num_seqs, shape.blocks_for(max_model_len), layers.attention_spans
    )
    _share_choices(matmul, channel)
    worker = Worker(model, cache, tables, groups, attention, matmul, device, config.runtime.debug, states)
    if captures:
        mixes = bool(channel.smallest(int(_can_mix(model))))  # ranks fuse on their own
        channel.together(lambda: _capture_cuda_graphs(worker, config, capturer or CudaCapturer(device), mixes))
    elif records:
        _record_cpu_graphs(worker, config, most_recorded)
    return worker


def _share_choices(matmul: NativeMatmul | None, channel: Channel) -> None:
    """All ranks multiply with the kernels that are fastest on rank 0, so that equal inputs have equal products."""
    choices = channel.gather(None if matmul is None else matmul.choices)[0]
    if matmul is not None and choices is not None:
        matmul.adopt(choices)


def cache_sizing(config: Config, model: ShiftModel, groups: ProcessGroups) -> CacheSizing:
    """What this rank's cache needs for blocks and requests."""
    shape, scheduler, max_model_len = cache_shape(config, model, groups), config.scheduler, model.shape.max_model_len
    layers = CacheGroups.of(model.attention_options, max_model_len, [entry.span for entry in shape.entries])
    return CacheSizing(shape, layers, max_model_len, scheduler.max_num_seqs, scheduler.max_num_batched_tokens)


def cache_shape(config: Config, model: ShiftModel, groups: ProcessGroups) -> CacheShape:
    """The shape of this rank's cache blocks."""
    dtype = {"auto": model.dtype, "fp8": FP8, **DTYPES}[config.cache.dtype]
    return model.shape.cache_shape(groups.shard, groups.layout, config.cache.block_size, dtype, index_dtype=model.dtype)


def make_states(
    config: Config,
    model: ShiftModel,
    sizing: CacheSizing,
    num_bytes: int,
    left: int,
    device: torch.device,
    scratch_slots: int,
) -> StateCache | None:
    """The slots of the model's recurrent states; None if it has none. There may be fewer than `scheduler.max_num_seqs`.

    num_bytes: of the whole cache or, if the recipe sets `cache.num_blocks`, of the keys and values; left: bytes that
    are left besides. Raises `ConfigError` if one request does not fit.
    """
    shapes, settings = model.state_shapes, config.cache
    if not shapes:
        _refuse_snapshots(config, model.injection.config.model_type)
        return None
    # Drafted tokens need snapshots, too: of the states before them.
    takes_snapshots = settings.enable_prefix_caching or config.speculation.is_enabled
    wanted = settings.state_snapshots if takes_snapshots else 0
    slots = StateSizing(slot_bytes(shapes), config.scheduler.max_num_seqs, wanted, scratch_slots)
    if settings.num_blocks is not None:
        num_sequences, num_snapshots = slots.slots_within(left, 0)
    else:
        num_sequences, num_snapshots = slots.slots_within(num_bytes, sizing.longest_request_bytes)
    return StateCache(shapes, num_sequences, device, num_snapshots, scratch_slots)


def _refuse_snapshots(config: Config, model_type: str) -> None:
    """Raise `ConfigError` if the recipe asks for snapshots of states that the model does not have."""
    for key in ("state_snapshots", "state_snapshot_interval"):
        if value := getattr(config.cache, key):
            raise ConfigError(
                f"cache.{key} = {value}: model type {model_type!r} has no recurrent layers, so there are no states to "
                "save; use null"
            )


def _limit_sequences(config: Config, states: StateCache, is_first: bool) -> None:
    """Let no more requests run than there are slots of states."""
    wanted, slots = config.scheduler.max_num_seqs, states.num_sequences
    if slots < wanted and is_first:
        logger.warning(
            "at most %d requests run at a time, not scheduler.max_num_seqs = %d: the recurrent states of each take %d "
            "bytes on every rank",
            slots,
            wanted,
            states.num_bytes_per_slot,
        )
    config.scheduler.max_num_seqs = slots


def make_attention(name: str, model: ShiftModel, shape: CacheShape, device: torch.device) -> AttentionBackend:
    """The attention backend `name` for this model and cache. Raises `ConfigError` if it cannot be used."""
    if device.type == "cpu":
        return make_backend(name, device)
    return make_gpu_backend(name, device, attention_needs(model, shape, device))


def attention_needs(model: ShiftModel, shape: CacheShape, device: torch.device) -> AttentionNeeds:
    """What the model, its cache and the GPU require of attention."""
    widths = sorted({(layer.key_width, layer.value_width) for layer in shape.own_layers}) or [(0, 0)]
    return AttentionNeeds.of(
        [options for options in model.attention_options if options is not None],
        model.shape.max_model_len,
        capability(device) or torch.cuda.get_device_capability(device),
        model.dtype,
        shape.dtype,
        *widths[-1],
        shape.block_size,
        shape.values_in_keys,
        widths[:-1],
        shape.selects_keys,
    )


def _max_decode_rows(config: Config) -> int:
    """The most rows of a step of decodes and drafted tokens."""
    scheduler = config.scheduler
    rows = scheduler.max_num_seqs * (1 + config.speculation.max_drafted)
    return min(rows, scheduler.max_num_batched_tokens)


def _can_mix(model: ShiftModel) -> bool:
    """Whether a graph fits all divisions of its tokens over sequences: layers with states run each sequence alone."""
    return model.decoder is not None and not model.state_shapes


def _most_recorded_tokens(config: Config, model: ShiftModel, shape: CacheShape, attention: AttentionBackend) -> int:
    """The most tokens of a step with prompt tokens that is recorded on a CPU; 0 if none is.

    What reads hidden states (`speculation`), computes keys of latents for long prompts, or skips tokens that need no
    logits runs such steps layer by layer.
    """
    assert isinstance(attention, NativeAttention)
    if config.speculation.method in HEADS or shape.values_in_keys or shape.entries:
        return 0
    if model.skips_tokens or not _can_mix(model):
        return 0
    limit = min(config.runtime.max_captured_tokens, config.scheduler.max_num_batched_tokens, attention.longest_query)
    return limit if limit >= SMALLEST else 0


def _record_cpu_graphs(worker: Worker, config: Config, most_mixed: int) -> None:
    """Record steps when they recur. most_mixed: the most tokens of one with prompt tokens; 0: only decode steps."""
    model, cache, groups, contexts = worker.model, worker.cache, worker.groups, worker.contexts
    attention, matmul = worker.backend, worker.matmul
    assert isinstance(attention, NativeAttention)
    assert matmul is not None
    runner = CpuGraphRunner(model, cache, groups, attention, matmul, _max_decode_rows(config), worker.states)
    worker.graphs = runner
    if most_mixed:
        max_num_seqs = config.scheduler.max_num_seqs
        worker.mixed_graphs = CpuMixedGraphRunner(model, contexts, attention, runner.arena, max_num_seqs, most_mixed)


def _make_cache(
    config: CacheConfig, sizing: CacheSizing, num_bytes: int, device: torch.device, scratch_blocks: int
) -> PagedCache:
    if config.num_blocks is not None:
        num_blocks = sizing.blocks_per_group(config.num_blocks)
    else:
        num_blocks = sizing.blocks_within(num_bytes, use_all=config.memory_bytes is not None)
    sizing.check_fits_one_request(num_blocks, in_blocks=config.num_blocks is not None)
    return PagedCache(sizing.shape, num_blocks, device, scratch_blocks, sizing.groups)


def _capture_cuda_graphs(worker: Worker, config: Config, capturer: Capturer, mixes: bool) -> None:
    """Capture the decode steps of every mode, and small steps with prompt tokens if `mixes`. Collective."""
    assert isinstance(worker.backend, KernelAttention)
    max_num_seqs, max_tokens = config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens
    runner = CudaGraphRunner(
        worker.model,
        worker.cache,
        worker.groups,
        worker.backend,
        worker.eager.inputs,
        capturer,
        worker.device,
        _max_decode_rows(config),
        worker.states,
    )
    runner.capture_all()
    worker.graphs = runner
    limit = min(config.runtime.max_captured_tokens, max_tokens)
    if mixes and limit and worker.backend.captures_prompts:
        inputs = worker.eager.inputs
        mixed = MixedGraphRunner(worker.model, worker.contexts, inputs, capturer, max_num_seqs, limit)
        mixed.capture_all()
        worker.mixed_graphs = mixed
