"""What attention reads of a step, group by group, on its way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ulysses_infer.attention.backend import AttentionMetadata, HostSequences, KernelSequences, running_sums
from ulysses_infer.worker.block_tables import GroupArrays, StepArrays


class StepMetadata:
    """The arrays of a step that are sent to the device, and what is made of them there."""

    def __init__(self, arrays: StepArrays, for_kernels: bool) -> None:
        """`for_kernels`: whether the kernels of a GPU are to read them."""
        self._arrays = arrays
        self._hosts = [_host_sequences(arrays, group) if for_kernels else None for group in arrays.groups]

    def to_send(self) -> list[np.ndarray]:
        """The arrays of all groups."""
        sent: list[np.ndarray] = []
        for group, host in zip(self._arrays.groups, self._hosts, strict=True):
            sent += [group.slots, group.block_tables] if host is None else [group.slots, *_kernel_arrays(host)]
        return sent

    def of_groups(self, sent: Sequence[torch.Tensor]) -> list[AttentionMetadata]:
        """One a group. `sent`: the tensors of `to_send`."""
        each = len(sent) // len(self._hosts)
        return [
            self._metadata(group, host, *sent[number * each : (number + 1) * each])
            for number, (group, host) in enumerate(zip(self._arrays.groups, self._hosts, strict=True))
        ]

    def _metadata(
        self,
        group: GroupArrays,
        host: HostSequences | None,
        slots: torch.Tensor,
        block_tables: torch.Tensor,
        *lens: torch.Tensor,
    ) -> AttentionMetadata:
        query_lens, kernel = self._arrays.query_lens, None
        if host is not None:
            longest = max(query_lens), max(group.context_lens)
            kernel = KernelSequences(lens[0], lens[1], lens[2], block_tables, *longest, host)
        return AttentionMetadata(slots, query_lens, group.context_lens, block_tables, kernel)


def _host_sequences(arrays: StepArrays, group: GroupArrays) -> HostSequences:
    """The step's sequences as kernels take them."""
    query_lens, context_lens = np.array(arrays.query_lens, np.int32), np.array(group.context_lens, np.int32)
    return HostSequences(query_lens, context_lens, group.block_tables.astype(np.int32))


def _kernel_arrays(host: HostSequences) -> tuple[np.ndarray, ...]:
    """The block tables, then the other arrays of `KernelSequences` in its order."""
    return host.block_tables, running_sums(host.query_lens), running_sums(host.context_lens), host.context_lens
