"""The interface of attention backends, and the metadata of a step that they read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class HostSequences:
    """The sequences of a step on the host, for kernels whose work is planned there. All int32."""

    query_lens: np.ndarray  # [N]
    context_lens: np.ndarray  # [N], the step's own tokens included
    block_tables: np.ndarray  # [N, blocks of the longest]


@dataclass(frozen=True)
class KernelSequences:
    """The sequences of a step on the device, int32. The two bounds are numbers, so that nothing waits for the GPU."""

    cu_query_lens: torch.Tensor  # [N + 1], 0 and the running sums of the query lengths
    cu_context_lens: torch.Tensor  # [N + 1]
    context_lens: torch.Tensor  # [N]
    block_tables: torch.Tensor  # [N, at least the blocks of the longest]
    max_query_len: int
    max_context_len: int
    host: HostSequences
    captured: bool = False
    """Whether the tensors are the static inputs of a captured step; then `host` is what it was captured with."""
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What a backend has planned for them."""

    @property
    def num_sequences(self) -> int:
        """N, the padding of a captured step included."""
        return self.context_lens.shape[0]

    @property
    def decodes_only(self) -> bool:
        """Whether every sequence has a single query token, its last."""
        return self.max_query_len == 1


@dataclass(frozen=True)
class AttentionMetadata:
    """The sequences of one step as one cache group's layers read them, in batch order; equal on every rank.

    slots: [T] int64, where each batched token's key and value go (block * block_size + offset).
    query_lens[i] tokens of sequence i are in the batch; context_lens[i] tokens, those included, are in its table.
    block_tables: [num_sequences, max_blocks] int64. Where layers see a part of the past alone, a table begins at a
    block from which windows and chunks may be counted, and blocks that no query of the step sees are not to be read.
    kernel: the same for the kernels of a GPU; None on a CPU.
    """

    slots: torch.Tensor
    query_lens: list[int]
    context_lens: list[int]
    block_tables: torch.Tensor
    kernel: KernelSequences | None = None
    prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What a backend has made for the step, for its other layers."""


@dataclass(frozen=True)
class AttentionOptions:
    """How one layer attends: softmax scale, local windows, logit soft cap, attention sinks (one a local head)."""

    scaling: float
    sliding_window: int | None = None
    chunk_size: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def first_visible(self, position: int) -> int:
        """The earliest key position that a query at `position` sees."""
        first = 0
        if self.sliding_window is not None:
            first = max(first, position - self.sliding_window + 1)
        if self.chunk_size is not None:
            first = max(first, position - position % self.chunk_size)
        return first

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Which keys each query sees. queries: [n] positions; keys: [m] positions; returns bool [n, m]."""
        mask = queries[:, None] >= keys[None, :]
        if self.sliding_window is not None:
            mask &= queries[:, None] < (keys + self.sliding_window)[None, :]
        if self.chunk_size is not None:
            mask &= (queries // self.chunk_size)[:, None] == (keys // self.chunk_size)[None, :]
        return mask


class AttentionBackend(Protocol):
    """Attention of this rank's own heads over the cache. Knows nothing of modes or ranks."""

    name: str

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


class KernelAttention(ABC):
    """Base of the backends that read nothing but `AttentionMetadata.kernel`: their steps can be captured in graphs."""

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
        """See `AttentionBackend.attend`."""

    def replan(self, sequences: KernelSequences, host: HostSequences) -> None:  # noqa: B027
        """Before a captured step is replayed: plan it anew for `host`, what its static `sequences` now are.

        Most kernels plan nothing.
        """


def running_sums(lengths: np.ndarray) -> np.ndarray:
    """0 and the running sums of `lengths`: [N + 1] int32."""
    sums = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=sums[1:])
    return sums
