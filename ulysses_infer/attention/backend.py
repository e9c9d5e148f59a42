"""The interface of attention backends, and the step metadata that they read."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from ulysses_infer.attention.sinks import with_sinks
from ulysses_infer.attention.span import AttentionSpan


@dataclass(frozen=True)
class HostSequences:
    """The sequences of a step on the host, for kernels that are planned there. All arrays are int32."""

    query_lens: np.ndarray  # [N]
    context_lens: np.ndarray  # [N], including the step's own tokens
    block_tables: np.ndarray  # [N, blocks of the longest]


@dataclass(frozen=True)
class KernelSequences:
    """The sequences of a step on the device, int32. The maxima are Python ints, to avoid waiting for the GPU."""

    cu_query_lens: torch.Tensor  # [N + 1], cumulative sums of the query lengths, from 0
    cu_context_lens: torch.Tensor  # [N + 1]
    context_lens: torch.Tensor  # [N]
    block_tables: torch.Tensor  # [N, at least the blocks of the longest]
    max_query_len: int
    max_context_len: int
    host: HostSequences
    captured: bool = False
    """Whether the tensors are the static inputs of a captured step; then `host` has the values at capture."""
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Plans of the backend for these sequences."""

    @property
    def num_sequences(self) -> int:
        """N, including the padding of a captured step."""
        return self.context_lens.shape[0]

    @property
    def decodes_only(self) -> bool:
        """Whether every sequence has a single query token."""
        return self.max_query_len == 1


@dataclass(frozen=True)
class AttentionMetadata:
    """The sequences of one step as seen by the layers of one cache group, in batch order; equal on every rank.

    slots: [T] int64, the cache slot of each token's key and value (block * block_size + offset).
    query_lens[i]: tokens of sequence i in the batch. context_lens[i]: tokens in its block table, including those.
    block_tables: [num_sequences, max_blocks] int64. With a limited attention span a table starts at a block from which
    windows and chunks can be counted; blocks that no query of the step sees must not be read.
    kernel: the same for GPU kernels; None on a CPU.
    """

    slots: torch.Tensor
    query_lens: list[int]
    context_lens: list[int]
    block_tables: torch.Tensor
    kernel: KernelSequences | None = None
    prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What the backend's first layer has computed for the other layers of the step."""


@dataclass(frozen=True)
class AttentionOptions:
    """Attention parameters of a layer: softmax scale, span, logit soft cap, and per local head: sinks, ALiBi slopes.

    ALiBi: scores, after the soft cap, fall by the slope for every token between query and key.
    sinks: [Hq], or of each query token [T, Hq].
    relative: [T, Hq, E], what is added to a query's scores, after the soft cap, for the key 0 .. E - 1 tokens back;
    nothing is added for keys further back.
    """

    scaling: float
    sliding_window: int | None = None
    chunk_size: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    alibi: torch.Tensor | None = None
    relative: torch.Tensor | None = None

    def of_rows(self, rows: slice) -> AttentionOptions:
        """Those of some of the step's query tokens."""
        sinks, relative = self.sinks, self.relative
        if relative is None and (sinks is None or sinks.dim() == 1):
            return self
        sinks = sinks if sinks is None or sinks.dim() == 1 else sinks[rows]
        return replace(self, sinks=sinks, relative=None if relative is None else relative[rows])

    @property
    def span(self) -> AttentionSpan:
        """How far back queries see."""
        return AttentionSpan(self.sliding_window, self.chunk_size)

    @property
    def is_per_head(self) -> bool:
        """Whether some parameter differs between heads."""
        return self.sinks is not None or self.alibi is not None or self.relative is not None

    @property
    def window_left(self) -> int:
        """Keys that a query sees before its own, as kernels take it; -1: all."""
        return -1 if self.sliding_window is None else self.sliding_window - 1

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Which keys each query sees. queries: [n] positions; keys: [m] positions; returns bool [n, m]."""
        mask = queries[:, None] >= keys[None, :]
        if self.sliding_window is not None:
            mask &= queries[:, None] < (keys + self.sliding_window)[None, :]
        if self.chunk_size is not None:
            mask &= (queries // self.chunk_size)[:, None] == (keys // self.chunk_size)[None, :]
        return mask


class AttentionBackend(Protocol):
    """Attention of this rank's heads over the paged cache, independent of modes and ranks."""

    name: str

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """query: [T, Hq, d]; keys, values: [num_blocks, block_size, Hkv, d | dv]; returns [T, Hq, dv]."""
        ...


class KernelAttention(AttentionBackend):
    """Base of backends that read `AttentionMetadata.kernel` only, so that CUDA graphs can capture their steps."""

    captures_prompts = False
    """Whether one captured launch serves any division of its tokens over sequences, not only one token each."""

    def replan(self, sequences: KernelSequences, host: HostSequences) -> None:
        """Plan a captured step again before its replay, for `host`, the current values of its static `sequences`.

        Does nothing for kernels without plans.
        """


def output_with_sinks(result: Any, options: AttentionOptions) -> torch.Tensor:
    """The output of a FlashAttention kernel, which returns (output [T, Hq, d], log-sum-exp [Hq, T]) if there are sinks.

    Without sinks `result` is the output.
    """
    if options.sinks is None:
        output: torch.Tensor = result
        return output
    output, log_sum_exp = result[:2]
    return with_sinks(output, log_sum_exp.t(), options.sinks)


def running_sums(lengths: np.ndarray) -> np.ndarray:
    """Cumulative sums of `lengths`, from 0: [N + 1] int32."""
    sums = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=sums[1:])
    return sums
