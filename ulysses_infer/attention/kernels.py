"""What attention kernels on a GPU need of a step: its sequences as 32-bit tensors on the device, prepared once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions


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


def with_sinks(output: torch.Tensor, log_sum: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Attention with sinks from attention without.

    A sink adds exp(sink) to the softmax's denominator and nothing to its numerator, so it scales the output by
    exp(lse) / (exp(lse) + exp(sink)). output: [T, Hq, dv]; log_sum: [T, Hq], natural logarithm; sinks: [Hq].
    """
    share = torch.sigmoid(log_sum.float() - sinks.float())
    return output * share[..., None].to(output.dtype)
