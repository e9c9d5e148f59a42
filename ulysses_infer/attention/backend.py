"""What every attention backend takes and gives: queries of one step against the paged cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ulysses_infer.attention.kernels import KernelSequences
from ulysses_infer.errors import ConfigError
from ulysses_infer.native.library import NativeUnavailableError, is_available


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


def make_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend a recipe names; `auto` takes the best one that runs on `device`. Raises `ConfigError`."""
    from ulysses_infer.attention.native import NativeAttention
    from ulysses_infer.attention.torch_loop import TorchLoopAttention

    if name == "torch" or (name == "auto" and (device.type != "cpu" or not is_available("attention"))):
        return TorchLoopAttention()
    if name not in ("auto", "native"):
        raise ConfigError(f"runtime.attention_backend is {name!r}; choose one of auto, torch, native")
    if device.type != "cpu":
        raise ConfigError(f"runtime.attention_backend is native, which runs on a CPU, not on {device.type}; use auto")
    try:
        return NativeAttention()
    except NativeUnavailableError as error:
        raise ConfigError(f"runtime.attention_backend is native, but {error}; use auto or torch") from error
