"""Attention backend of the `flashinfer` library for latents (MLA)."""

from __future__ import annotations

from typing import Any

import torch

from ulysses_infer.attention.backend import AttentionBackend, AttentionMetadata, AttentionOptions, running_sums
from ulysses_infer.attention.flashinfer import WORKSPACE_BYTES, pages_of
from ulysses_infer.attention.plans import HostArrays, PlanOrder

WIDTHS = (576, 512)  # of a latent and of its value part, which the kernel supports


class FlashInferLatentAttention:
    """Causal attention over latents, planned by the first layer of a step. Its steps cannot be captured.

    Keys and values that are expanded for a long chunk, and options that the kernel lacks, are left to another backend.
    """

    name = "flashinfer"

    def __init__(self, library: Any, device: torch.device, other: AttentionBackend) -> None:
        """library: the module `flashinfer`. other: attends where the kernel cannot."""
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper = library.mla.BatchMLAPagedAttentionWrapper(workspace)
        self._inputs, self._order, self._other = HostArrays(device), PlanOrder.on(device), other

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
        if metadata.prepared.get(self.name) != options.scaling:
            self._plan(query, keys, values, metadata, options)
            metadata.prepared[self.name] = options.scaling
        width = values.shape[3]
        latents = keys.squeeze(2)  # [pages, size, 576]
        output: torch.Tensor = self._wrapper.run(
            q_nope=query[..., :width],
            q_pe=query[..., width:],
            ckv_cache=latents[..., :width],
            kpe_cache=latents[..., width:],
        )
        return output

    def _plan(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> None:
        assert metadata.kernel is not None
        host, on_host = metadata.kernel.host, self._inputs.on_host
        pages, width = pages_of(host, keys.shape[1]), values.shape[3]
        inputs = {
            "qo_indptr": on_host(running_sums(host.query_lens)),
            "kv_indptr": on_host(pages.indptr),
            "kv_indices": on_host(pages.indices),  # the library reads the smallest and the largest
            "kv_len_arr": on_host(host.context_lens),
            "num_heads": query.shape[1],
            "head_dim_ckv": width,
            "head_dim_kpe": keys.shape[3] - width,
            "page_size": keys.shape[1],
            "causal": True,
            "sm_scale": options.scaling,
            "q_data_type": query.dtype,
            "kv_data_type": keys.dtype,
        }
        self._order.run(self._wrapper, lambda: self._wrapper.plan(**inputs))
