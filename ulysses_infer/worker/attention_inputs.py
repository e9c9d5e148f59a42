"""What attention reads of a step: arrays per cache group on the host, attention metadata on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ulysses_infer.attention.backend import AttentionMetadata, HostSequences, KernelSequences, running_sums
from ulysses_infer.worker.block_tables import GroupArrays, StepArrays


class AttentionInputs:
    """The attention inputs of one step, before and after their transfer to the device."""

    def __init__(self, arrays: StepArrays, for_kernels: bool) -> None:
        """for_kernels: also prepare the 32-bit arrays that GPU kernels read."""
        self._arrays = arrays
        self._hosts = [_host_sequences(arrays, group) if for_kernels else None for group in arrays.groups]

    def to_send(self) -> list[np.ndarray]:
        """The arrays of all cache groups to transfer."""
        fields: list[np.ndarray] = []
        for group, host in zip(self._arrays.groups, self._hosts, strict=True):
            fields += [group.slots, group.block_tables] if host is None else [group.slots, *_kernel_arrays(host)]
        return fields

    @property
    def num_sent(self) -> int:
        """The number of arrays of `to_send`."""
        return sum(2 if host is None else 5 for host in self._hosts)

    def metadata(self, sent: Sequence[torch.Tensor]) -> list[AttentionMetadata]:
        """The metadata of each cache group. sent: the tensors of `to_send`, in its order."""
        width = len(sent) // len(self._hosts)
        return [
            self._metadata_of(group, host, *sent[number * width : (number + 1) * width])
            for number, (group, host) in enumerate(zip(self._arrays.groups, self._hosts, strict=True))
        ]

    def _metadata_of(
        self,
        group: GroupArrays,
        host: HostSequences | None,
        slots: torch.Tensor,
        block_tables: torch.Tensor,
        *lens: torch.Tensor,
    ) -> AttentionMetadata:
        query_lens, kernel = self._arrays.query_lens, None
        if host is not None:
            longest = max(query_lens, default=0), max(group.context_lens, default=0)
            kernel = KernelSequences(lens[0], lens[1], lens[2], block_tables, *longest, host)
        return AttentionMetadata(slots, query_lens, group.context_lens, block_tables, kernel)


def _host_sequences(arrays: StepArrays, group: GroupArrays) -> HostSequences:
    """The step's sequences as 32-bit arrays."""
    query_lens, context_lens = np.array(arrays.query_lens, np.int32), np.array(group.context_lens, np.int32)
    return HostSequences(query_lens, context_lens, group.block_tables.astype(np.int32))


def _kernel_arrays(host: HostSequences) -> tuple[np.ndarray, ...]:
    """The block tables, then the other arrays of `KernelSequences` in its order."""
    return host.block_tables, running_sums(host.query_lens), running_sums(host.context_lens), host.context_lens
