"""Attention backend of the `flashinfer` library: planned once per step and kind of layer, run per layer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.attention.backend import (
    AttentionMetadata,
    AttentionOptions,
    HostSequences,
    KernelAttention,
    KernelSequences,
    running_sums,
)
from ulysses_infer.attention.plans import HostArrays, PlanOrder
from ulysses_infer.attention.sinks import with_sinks

WORKSPACE_BYTES = 128 * 1024 * 1024  # what the library recommends
TENSOR_CORE_GROUP = 4  # from this many query heads per KV head on, decodes are faster on tensor cores


class PlanKey(NamedTuple):
    """What a plan depends on; layers with the same key share a plan."""

    num_attention_heads: int
    num_key_value_heads: int
    width: int
    block_size: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    scaling: float
    window_left: int
    softcap: float


class Pages(NamedTuple):
    """Block tables in the library's format."""

    indptr: np.ndarray  # [N + 1], where each sequence's pages start
    indices: np.ndarray  # [indptr[N]], the pages of all sequences
    last_page_len: np.ndarray  # [N], tokens in the last page of each


class FlashInferAttention(KernelAttention):
    """The library's wrappers for decode and prefill; windows and soft cap in the kernel, sinks from its log-sum-exp.

    Captured steps have separate wrappers, one per set of static sequences and kind of layer, whose plans are in fixed
    memory. A rank has the same heads in every mode, so modes share them.
    """

    name = "flashinfer"

    def __init__(self, library: Any, device: torch.device) -> None:
        """library: the module `flashinfer`."""
        self._library = library
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[tuple[bool, PlanKey], Any] = {}
        self._inputs, self._order = HostArrays(device), PlanOrder.on(device)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        sequences = metadata.kernel
        assert sequences is not None
        planned = self._planned(sequences, _key(query, keys, options))
        if options.sinks is None:
            output: torch.Tensor = planned.run(query, (keys, values))
            return output
        output, log2_sum_exp = planned.run(query, (keys, values), return_lse=True)  # [T, Hq, d] and [T, Hq], to base 2
        return with_sinks(output, log2_sum_exp * math.log(2.0), options.sinks)

    def replan(self, sequences: KernelSequences, host: HostSequences) -> None:
        """See `KernelAttention.replan`."""
        for key, wrapper in sequences.plans.items():
            self._plan_decode(wrapper, host, key)

    def _planned(self, sequences: KernelSequences, key: PlanKey) -> Any:
        """The planned wrapper for layers of kind `key` in this step."""
        if key not in sequences.plans:
            sequences.plans[key] = self._plan(sequences, key)
        return sequences.plans[key]

    def _plan(self, sequences: KernelSequences, key: PlanKey) -> Any:
        if sequences.captured:
            wrapper = self._captured_wrapper(sequences, key)
            self._plan_decode(wrapper, sequences.host, key)
            return wrapper
        slot = (sequences.decodes_only, key)
        if slot not in self._wrappers:
            self._wrappers[slot] = self._wrapper(*slot)
        wrapper = self._wrappers[slot]
        plan = self._plan_decode if sequences.decodes_only else self._plan_prefill
        plan(wrapper, sequences.host, key)
        return wrapper

    def _plan_decode(self, wrapper: Any, host: HostSequences, key: PlanKey) -> None:
        pages, common = self._pages(host, key), _common(key)
        self._order.run(wrapper, lambda: wrapper.plan(*pages, *_shape(key), **common))

    def _plan_prefill(self, wrapper: Any, host: HostSequences, key: PlanKey) -> None:
        starts, pages = self._inputs.on_host(running_sums(host.query_lens)), self._pages(host, key)
        self._order.run(wrapper, lambda: wrapper.plan(starts, *pages, *_shape(key), causal=True, **_common(key)))

    def _pages(self, host: HostSequences, key: PlanKey) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The arrays of `Pages`. The library reads all but the indices on the host, and would wait to copy those."""
        pages = pages_of(host, key.block_size)
        on_host = self._inputs.on_host
        return on_host(pages.indptr), self._inputs.on_device(pages.indices), on_host(pages.last_page_len)

    def _wrapper(self, decodes_only: bool, key: PlanKey) -> Any:
        if not decodes_only:
            return self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
        return self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_tensor_cores=_uses_tensor_cores(key)
        )

    def _captured_wrapper(self, sequences: KernelSequences, key: PlanKey) -> Any:
        count, device = sequences.num_sequences, self._workspace.device

        def static_buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        return self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=_uses_tensor_cores(key),
            paged_kv_indptr_buffer=static_buffer(count + 1),
            paged_kv_indices_buffer=static_buffer(sequences.block_tables.numel()),
            paged_kv_last_page_len_buffer=static_buffer(count),
        )


def pages_of(host: HostSequences, block_size: int) -> Pages:
    """The used part of the block tables, by sequence."""
    counts = ceil_div(host.context_lens, block_size)
    used = np.arange(host.block_tables.shape[1]) < counts[:, None]
    last = host.context_lens - (counts - 1) * block_size
    arrays = running_sums(counts), host.block_tables[used], last
    return Pages(*(array.astype(np.int32) for array in arrays))


def _key(query: torch.Tensor, keys: torch.Tensor, options: AttentionOptions) -> PlanKey:
    return PlanKey(
        query.shape[1],
        keys.shape[2],
        query.shape[2],
        keys.shape[1],
        query.dtype,
        keys.dtype,
        options.scaling,
        options.window_left,
        options.softcap or 0.0,
    )


def _uses_tensor_cores(key: PlanKey) -> bool:
    return key.num_attention_heads // key.num_key_value_heads >= TENSOR_CORE_GROUP


def _shape(key: PlanKey) -> tuple[int, int, int, int]:
    return key.num_attention_heads, key.num_key_value_heads, key.width, key.block_size


def _common(key: PlanKey) -> dict[str, Any]:
    return {
        "sm_scale": key.scaling,
        "window_left": key.window_left,
        "logits_soft_cap": key.softcap,
        "q_data_type": key.dtype,
        "kv_data_type": key.cache_dtype,
    }
