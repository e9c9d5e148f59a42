"""Attention backend of the `flashinfer` library for latents (MLA)."""

from __future__ import annotations

from typing import Any

import torch

from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions, running_sums
from ulysses_infer.attention.flashinfer import WORKSPACE_BYTES, pages_of
from ulysses_infer.attention.torch_loop import TorchLoopAttention

WIDTHS = (576, 512)  # of a latent and of its value part, which the kernel supports


class FlashInferLatentAttention:
    """Causal attention over latents, planned by the first layer of a step. Its steps cannot be captured.

    Falls back to torch for keys and values that are expanded for a long chunk, and for options that the kernel lacks.
    """

    name = "flashinfer"

    def __init__(self, library: Any, device: torch.device) -> None:
        """library: the module `flashinfer`."""
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper = library.mla.BatchMLAPagedAttentionWrapper(workspace)
        self._torch = TorchLoopAttention()

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
            return self._torch.attend(query, keys, values, metadata, options)
        if metadata.prepared.get(self.name) != options.scaling:
            self._plan(query, keys, values, metadata, options)
            metadata.prepared[self.name] = options.scaling
        width = values.shape[3]
        latents = keys.squeeze(2)  # [pages, size, 576]
        output: torch.Tensor = self._wrapper.run(
            query[..., :width], query[..., width:], latents[..., :width], latents[..., width:]
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
        host = metadata.kernel.host
        pages = pages_of(host, keys.shape[1])
        self._wrapper.plan(
            torch.from_numpy(running_sums(host.query_lens)),
            pages.indptr,
            pages.indices,
            torch.from_numpy(host.context_lens),
            query.shape[1],
            values.shape[3],
            keys.shape[3] - values.shape[3],
            keys.shape[1],
            True,
            options.scaling,
            query.dtype,
            keys.dtype,
        )
