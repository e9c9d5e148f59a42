"""The memory budget: how much the cache may use, computed before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ulysses_infer.cache.sizing import CacheSizing
from ulysses_infer.config import CacheConfig
from ulysses_infer.errors import ConfigError

CPU_CACHE_LIMIT = 4 << 30  # leaves host memory to other programs; a recipe can set more
GIB = 1 << 30
TAKEN_BYTES = 3 << 29
"""Assumed memory that is taken before the engine measures: driver, CUDA context, NCCL's buffers."""


@dataclass(frozen=True)
class MemoryBudget:
    """One rank's memory, in bytes."""

    available: int
    weights: int
    activations: int
    draft: int = 0
    """Of the model that drafts tokens, if there is one: weights, activations and cache."""
    offload: int = 0
    """Of the tier below the cache: on a CPU all of it in host memory, on a GPU the buffer for its copies."""

    @property
    def left(self) -> int:
        """Bytes left for the cache."""
        return self.available - self.weights - self.activations - self.draft - self.offload

    def __str__(self) -> str:
        return (
            f"{self.available / GIB:.2f} GiB available per rank, weights {self.weights / GIB:.2f} GiB, "
            f"activations {self.activations / GIB:.2f} GiB"
            + (f", draft model {self.draft / GIB:.2f} GiB" if self.draft else "")
            + (f", offloaded blocks {self.offload / GIB:.2f} GiB" if self.offload else "")
        )


def usable_memory(total: int, free: int, utilization: float) -> int:
    """Bytes that a rank may use of a GPU with `total` bytes of memory, of which `free` are free."""
    return int(total * utilization) - (total - free)


def assumed_memory(total: int, utilization: float) -> int:
    """`usable_memory` of a GPU that is not at hand: only `TAKEN_BYTES` are in use."""
    return usable_memory(total, total - TAKEN_BYTES, utilization)


def available_memory(device: torch.device, utilization: float, ranks_on_host: int) -> int:
    """Bytes that one rank may use: of its GPU's memory, or its share of the free host memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return usable_memory(total, free, utilization)
    import psutil

    return int(psutil.virtual_memory().available * utilization) // ranks_on_host


def activation_bytes(
    max_num_batched_tokens: int, hidden_size: int, intermediate_size: int, vocab_share: int, max_rows: int, width: int
) -> int:
    """Upper bound of one step's temporary tensors in bytes: hidden states, MLP activations and float32 logits."""
    per_token = width * (8 * hidden_size + 3 * intermediate_size)
    return max_num_batched_tokens * per_token + max_rows * vocab_share * 4


def check_weights_fit(budget: MemoryBudget) -> None:
    """Raise `ConfigError` if the weights do not fit."""
    if budget.left <= 0:
        raise ConfigError(
            f"the model does not fit: {budget}; use more ranks with a higher parallel.tp, a smaller dtype, or a lower "
            "scheduler.max_num_batched_tokens"
        )


def cache_bytes(config: CacheConfig, sizing: CacheSizing, budget: MemoryBudget, on_cpu: bool) -> int:
    """Bytes of this rank's cache. Raises `ConfigError` if the recipe requests more than is left."""
    if config.num_blocks is not None:
        wanted = sizing.num_bytes(sizing.blocks_per_group(config.num_blocks))
        _check_wanted(wanted, budget, f"cache.num_blocks {config.num_blocks}")
        return wanted
    if config.memory_bytes is not None:
        _check_wanted(config.memory_bytes, budget, f"cache.memory_bytes {config.memory_bytes}")
        return config.memory_bytes
    return min(budget.left, CPU_CACHE_LIMIT) if on_cpu else budget.left


def _check_wanted(wanted: int, budget: MemoryBudget, setting: str) -> None:
    if wanted > budget.left:
        raise ConfigError(
            f"{setting} takes {wanted / GIB:.2f} GiB, but {max(budget.left, 0) / GIB:.2f} GiB are left ({budget}); "
            "lower it"
        )
