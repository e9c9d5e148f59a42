"""Attention backend of the `flash-attn` library (FlashAttention-2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ulysses_infer.attention.backend import (
    AttentionMetadata,
    AttentionOptions,
    KernelAttention,
    output_with_sinks,
)


class FlashAttnAttention(KernelAttention):
    """`flash_attn_varlen_func` over block tables: windows, cap and ALiBi in the kernel, sinks from its log-sum-exp."""

    name = "flash_attn"

    def __init__(self, function: Callable[..., Any]) -> None:
        """function: `flash_attn.flash_attn_varlen_func`."""
        self._function = function

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
        window = options.window_left
        result = self._function(
            query,
            keys,
            values,
            cu_seqlens_q=sequences.cu_query_lens,
            cu_seqlens_k=sequences.cu_context_lens,
            max_seqlen_q=sequences.max_query_len,
            max_seqlen_k=sequences.max_context_len,
            softmax_scale=options.scaling,
            causal=True,
            window_size=(window, -1 if window < 0 else 0),
            softcap=options.softcap or 0.0,
            alibi_slopes=options.alibi,
            return_attn_probs=options.sinks is not None,
            block_table=sequences.block_tables,
        )
        return output_with_sinks(result, options)
