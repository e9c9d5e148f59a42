"""Attention backend of `torch.nn.attention.varlen.varlen_attn`, torch's built-in FlashAttention-2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ulysses_infer.attention.backend import (
    AttentionMetadata,
    AttentionOptions,
    KernelAttention,
    KernelSequences,
    output_with_sinks,
)


class VarlenAttention(KernelAttention):
    """`varlen_attn` over block tables: windows in the kernel, sinks from its log-sum-exp; no soft cap."""

    name = "varlen"

    def __init__(self, function: Callable[..., Any]) -> None:
        """function: `varlen_attn`."""
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
        from torch.nn.attention.varlen import AuxRequest

        sequences = metadata.kernel
        assert sequences is not None
        result = self._function(
            query,
            keys,
            values,
            sequences.cu_query_lens,
            sequences.cu_context_lens,
            sequences.max_query_len,
            sequences.max_context_len,
            return_aux=AuxRequest(lse=options.sinks is not None),
            scale=options.scaling,
            window_size=_window(sequences, options),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=sequences.context_lens,
            block_table=sequences.block_tables,
        )
        return output_with_sinks(result, options)  # the log-sum-exp is [Hq, T], although torch documents [T, Hq]


def _window(sequences: KernelSequences, options: AttentionOptions) -> tuple[int, int]:
    """Keys seen to the left and right of a query's own; -1: all. (-1, 0) means causal."""
    if options.sliding_window is not None:
        return options.window_left, 0
    # A decode query sees its whole sequence; without a mask the kernel packs its heads into rows.
    return (-1, -1) if sequences.decodes_only else (-1, 0)
