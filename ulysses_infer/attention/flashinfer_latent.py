"""Attention backend of the `flashinfer` library for latents (MLA)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ulysses_infer.attention.backend import (
    AttentionMetadata,
    AttentionOptions,
    HostSequences,
    KernelAttention,
    KernelSequences,
    running_sums,
)
from ulysses_infer.attention.flashinfer import WORKSPACE_BYTES, pages_of
from ulysses_infer.attention.plans import HostArrays, PlanOrder

WIDTHS = (576, 512)  # of a latent and of its value part, which the kernel supports
HOPPER = 9


class LatentPlanKey(NamedTuple):
    """What a plan depends on; layers with the same key share a plan."""

    num_attention_heads: int
    value_width: int
    rotary_width: int
    block_size: int
    scaling: float
    dtype: torch.dtype
    cache_dtype: torch.dtype


class FlashInferLatentAttention(KernelAttention):
    """Causal attention over latents: one plan per step and kind of layer. Captured steps have wrappers of their own.

    Keys and values that are expanded for a long chunk, and options that the kernel lacks, are left to another backend.
    """

    name = "flashinfer"

    def __init__(self, library: Any, device: torch.device, other: KernelAttention) -> None:
        """library: the module `flashinfer`. other: attends where the kernel cannot."""
        self._library = library
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._inputs, self._order, self._other = HostArrays(device), PlanOrder.on(device), other
        self._wrappers: dict[LatentPlanKey, Any] = {}

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        if keys.data_ptr() != values.data_ptr() or options != AttentionOptions(options.scaling):
            return self._other.attend(query, keys, values, metadata, options)
        assert metadata.kernel is not None
        planned, width = self._planned(metadata.kernel, _key(query, keys, values, options)), values.shape[3]
        latents = keys.squeeze(2)  # [pages, size, 576]
        output: torch.Tensor = planned.run(
            q_nope=query[..., :width],
            q_pe=query[..., width:],
            ckv_cache=latents[..., :width],
            kpe_cache=latents[..., width:],
        )
        return output

    def replan(self, sequences: KernelSequences, host: HostSequences) -> None:
        """See `KernelAttention.replan`."""
        for key, wrapper in sequences.plans.items():
            self._plan(wrapper, host, key)

    def _planned(self, sequences: KernelSequences, key: LatentPlanKey) -> Any:
        """The planned wrapper for layers of kind `key` in this step."""
        if key not in sequences.plans:
            wrapper = self._captured_wrapper(sequences) if sequences.captured else self._wrapper(key)
            self._plan(wrapper, sequences.host, key)
            sequences.plans[key] = wrapper
        return sequences.plans[key]

    def _wrapper(self, key: LatentPlanKey) -> Any:
        if key not in self._wrappers:
            self._wrappers[key] = self._library.mla.BatchMLAPagedAttentionWrapper(self._workspace)
        return self._wrappers[key]

    def _captured_wrapper(self, sequences: KernelSequences) -> Any:
        count, device = sequences.num_sequences, self._workspace.device

        def static_buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        return self._library.mla.BatchMLAPagedAttentionWrapper(
            self._workspace,
            use_cuda_graph=True,
            qo_indptr=static_buffer(count + 1),
            kv_indptr=static_buffer(count + 1),
            kv_indices=static_buffer(sequences.block_tables.numel()),
            kv_len_arr=static_buffer(count),
            backend=_kernels_that_plan_again(device),
        )

    def _plan(self, wrapper: Any, host: HostSequences, key: LatentPlanKey) -> None:
        pages, on_host = pages_of(host, key.block_size), self._inputs.on_host
        inputs = {
            "qo_indptr": on_host(running_sums(host.query_lens)),
            "kv_indptr": on_host(pages.indptr),
            "kv_indices": on_host(pages.indices),  # the library reads the smallest and the largest
            "kv_len_arr": on_host(host.context_lens),
            "num_heads": key.num_attention_heads,
            "head_dim_ckv": key.value_width,
            "head_dim_kpe": key.rotary_width,
            "page_size": key.block_size,
            "causal": True,
            "sm_scale": key.scaling,
            "q_data_type": key.dtype,
            "kv_data_type": key.cache_dtype,
        }
        self._order.run(wrapper, lambda: wrapper.plan(**inputs))


def _key(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: AttentionOptions) -> LatentPlanKey:
    width = values.shape[3]
    return LatentPlanKey(
        query.shape[1], width, keys.shape[3] - width, keys.shape[1], options.scaling, query.dtype, keys.dtype
    )


def _kernels_that_plan_again(device: torch.device) -> str:
    """The library's kernels for `device` that can be planned again once they are captured."""
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER
    return "fa3" if on_hopper else "fa2"
