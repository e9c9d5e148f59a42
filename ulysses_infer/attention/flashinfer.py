"""Attention backend of the `flashinfer` library: planned once per step and kind of layer, run per layer."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    """Block tables in the library's format, on the host, int32."""

    indptr: torch.Tensor  # [N + 1], where each sequence's pages start
    indices: torch.Tensor  # [indptr[N]], the pages of all sequences
    last_page_len: torch.Tensor  # [N], tokens in the last page of each


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
        self._copied: dict[Any, torch.cuda.Event] = {}  # by wrapper; recorded after a plan was copied

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
            self._run_plan(_plan_decode, wrapper, host, key)

    def _planned(self, sequences: KernelSequences, key: PlanKey) -> Any:
        """The planned wrapper for layers of kind `key` in this step."""
        if key not in sequences.plans:
            sequences.plans[key] = self._plan(sequences, key)
        return sequences.plans[key]

    def _plan(self, sequences: KernelSequences, key: PlanKey) -> Any:
        if sequences.captured:
            wrapper = self._captured_wrapper(sequences, key)
            self._run_plan(_plan_decode, wrapper, sequences.host, key)
            return wrapper
        slot = (sequences.decodes_only, key)
        if slot not in self._wrappers:
            self._wrappers[slot] = self._wrapper(*slot)
        wrapper = self._wrappers[slot]
        plan = _plan_decode if sequences.decodes_only else _plan_prefill
        self._run_plan(plan, wrapper, sequences.host, key)
        return wrapper

    def _run_plan(
        self, plan: Callable[[Any, HostSequences, PlanKey], None], wrapper: Any, host: HostSequences, key: PlanKey
    ) -> None:
        """Plan `wrapper`. Plans are copied from one pinned buffer, so the copy of the last plan must finish first."""
        if wrapper in self._copied:
            self._copied[wrapper].synchronize()
        plan(wrapper, host, key)
        if self._workspace.is_cuda:
            self._copied.setdefault(wrapper, torch.cuda.Event()).record()

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
    return Pages(*(torch.from_numpy(array.astype(np.int32)) for array in arrays))


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


def _plan_decode(wrapper: Any, host: HostSequences, key: PlanKey) -> None:
    wrapper.plan(
        *pages_of(host, key.block_size),
        key.num_attention_heads,
        key.num_key_value_heads,
        key.width,
        key.block_size,
        **_common(key),
    )


def _plan_prefill(wrapper: Any, host: HostSequences, key: PlanKey) -> None:
    wrapper.plan(
        torch.from_numpy(running_sums(host.query_lens)),
        *pages_of(host, key.block_size),
        key.num_attention_heads,
        key.num_key_value_heads,
        key.width,
        key.block_size,
        causal=True,
        **_common(key),
    )


def _common(key: PlanKey) -> dict[str, Any]:
    return {
        "sm_scale": key.scaling,
        "window_left": key.window_left,
        "logits_soft_cap": key.softcap,
        "q_data_type": key.dtype,
        "kv_data_type": key.cache_dtype,
    }
