"""Attention backend of the `flash-attn` library (FlashAttention-2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions, KernelAttention
from ulysses_infer.attention.sinks import with_sinks


class FlashAttnAttention(KernelAttention):
    """`flash_attn_varlen_func` over block tables: windows and soft cap are the kernel's, sinks come from its sums."""

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
        window = -1 if options.sliding_window is None else options.sliding_window - 1
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
            return_attn_probs=options.sinks is not None,
            block_table=sequences.block_tables,
        )
        if options.sinks is None:
            output: torch.Tensor = result
            return output
        output, log_sum = result[:2]  # [T, Hq, d] and [Hq, T]
        return with_sinks(output, log_sum.t(), options.sinks)
