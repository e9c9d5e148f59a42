"""Attention backend of the project's Triton kernel, which every GPU with Triton runs."""

from __future__ import annotations

import torch

from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions, KernelAttention
from ulysses_infer.kernels.attention import Sequences, Softmax, attention


class TritonAttention(KernelAttention):
    """All masks, soft caps, sinks, head widths, block sizes and caches, latents (MLA) included. Nothing is planned."""

    name = "triton"
    captures_prompts = True

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        kernel = metadata.kernel
        assert kernel is not None
        sequences = Sequences(
            kernel.cu_query_lens,
            kernel.context_lens,
            kernel.block_tables,
            kernel.max_query_len,
            kernel.max_context_len,
        )
        softmax = Softmax(
            options.scaling,
            options.sliding_window,
            options.chunk_size,
            options.softcap,
            options.sinks,
            options.alibi,
            relative=options.relative,
        )
        return attention(query, keys, values, sequences, softmax)
