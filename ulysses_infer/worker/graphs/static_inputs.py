"""Fixed memory that graphs read: each step's inputs are written to the same addresses before a replay.

A CUDA graph has a fixed number of rows, so a step is padded up to it. Padding rows are sequences of one token in a
scratch block of the cache. A CPU graph is recorded for an exact number of rows and needs no padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ulysses_infer.attention.backend import AttentionMetadata, HostSequences, KernelSequences, running_sums
from ulysses_infer.attention.native import NativeAttention
from ulysses_infer.worker.block_tables import GroupArrays
from ulysses_infer.worker.step import Step
from ulysses_infer.worker.transfer import StepInputs


class CudaGroupInputs:
    """What the layers of one cache group read in CUDA graphs of `size` rows."""

    def __init__(self, size: int, block_tables: torch.Tensor, max_context_len: int, scratch_block: int) -> None:
        """block_tables: [size, blocks of the longest sequence] int32; may be part of a larger bucket's."""
        device = block_tables.device
        self.size, self._scratch_block = size, scratch_block
        self._slots = torch.zeros(size, dtype=torch.int64, device=device)
        self._lens = torch.zeros(2, size + 1, dtype=torch.int32, device=device)  # running sums; lengths and one unused
        self._block_tables = block_tables
        self._padding = HostSequences(
            np.ones(size, np.int32), np.ones(size, np.int32), np.full((size, 1), scratch_block, np.int32)
        )
        starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.sequences = KernelSequences(
            starts, self._lens[0], self._lens[1, :size], block_tables, 1, max_context_len, self._padding, captured=True
        )
        # Backends that are captured do not read the lists.
        self.metadata = AttentionMetadata(self._slots, [], [], block_tables, self.sequences)

    def to_send(self, group: GroupArrays | None, block_size: int) -> tuple[HostSequences, list[np.ndarray]]:
        """The sequences of a step with padding, and the arrays for `write`. group: None is a step without sequences."""
        slots = np.full(self.size, self._scratch_block * block_size, dtype=np.int64)
        host = self._padding
        if group is not None:
            slots[: len(group.slots)] = group.slots
            host = self._padded(group)
        lens = np.zeros((2, self.size + 1), dtype=np.int32)
        lens[0], lens[1, : self.size] = running_sums(host.context_lens), host.context_lens
        return host, [slots, lens, host.block_tables]

    def write(self, slots: torch.Tensor, lens: torch.Tensor, block_tables: torch.Tensor) -> None:
        """Copy what was sent into the fixed memory."""
        self._slots.copy_(slots)
        self._lens.copy_(lens)
        # Columns further right belong to earlier steps; no context length covers them.
        self._block_tables[:, : block_tables.shape[1]].copy_(block_tables)

    def _padded(self, group: GroupArrays) -> HostSequences:
        count, width = group.block_tables.shape
        contexts = np.ones(self.size, dtype=np.int32)
        contexts[:count] = group.context_lens
        tables = np.full((self.size, width), self._scratch_block, dtype=np.int32)
        tables[:count] = group.block_tables
        return HostSequences(self._padding.query_lens, contexts, tables)


class CudaInputs:
    """What CUDA graphs of `size` rows read, in every mode."""

    def __init__(
        self, size: int, groups: Sequence[CudaGroupInputs], device: torch.device, scratch_slot: int = 0
    ) -> None:
        """scratch_slot: of the recurrent states of padding rows."""
        self.size, self.groups, self._scratch_slot = size, list(groups), scratch_slot
        self._tokens = torch.zeros(3, size, dtype=torch.int64, device=device)
        self.token_ids, self.positions, self.slots = self._tokens

    def fill(self, step: Step | None, block_size: int, transfer: StepInputs) -> list[HostSequences]:
        """Write a step of at most `size` rows; returns its sequences with padding. step: None is padding only."""
        tokens = np.zeros((3, self.size), dtype=np.int64)
        tokens[2] = self._scratch_slot
        group_arrays: Sequence[GroupArrays | None] = [None] * len(self.groups)
        if step is not None:
            tokens[:, : step.plan.num_tokens] = step.plan.token_ids, step.arrays.positions, step.arrays.rows
            group_arrays = step.arrays.groups
        hosts, fields = [], [tokens]
        for group, arrays in zip(self.groups, group_arrays, strict=True):
            host, sent = group.to_send(arrays, block_size)
            hosts.append(host)
            fields += sent
        sent_tokens, *rest = transfer.send(fields)
        self._tokens.copy_(sent_tokens)
        for number, group in enumerate(self.groups):
            group.write(*rest[3 * number : 3 * number + 3])
        return hosts


class CpuInputs:
    """What CPU graphs read: the first n rows are those of a graph of n rows."""

    def __init__(self, max_rows: int, max_blocks: int, num_groups: int) -> None:
        self.token_ids, self.positions, self.slots = np.zeros((3, max_rows), dtype=np.int64)
        self._groups = [_CpuGroupInputs(max_rows, max_blocks) for _ in range(num_groups)]

    def fill(self, step: Step) -> None:
        """Write a step."""
        size, arrays = step.plan.num_tokens, step.arrays
        self.token_ids[:size] = step.plan.token_ids
        self.positions[:size] = arrays.positions
        self.slots[:size] = arrays.rows
        step.fill_placeholders(torch.from_numpy(self.token_ids[:size]))
        for group, own in zip(self._groups, arrays.groups, strict=True):
            group.fill(own, size)

    def metadata(self, size: int, backend: NativeAttention, block_size: int) -> list[AttentionMetadata]:
        """The first `size` rows of each cache group, for `backend`."""
        return [group.metadata(size, backend, block_size) for group in self._groups]


class _CpuGroupInputs:
    """What the layers of one cache group read in CPU graphs."""

    def __init__(self, max_rows: int, max_blocks: int) -> None:
        self._slots = np.zeros(max_rows, dtype=np.int64)
        self._context_lens = np.ones(max_rows, dtype=np.int64)
        self._block_tables = np.zeros((max_rows, max_blocks), dtype=np.int64)

    def fill(self, group: GroupArrays, size: int) -> None:
        # Columns further right belong to earlier steps; no context length covers them.
        self._slots[:size], self._context_lens[:size] = group.slots, group.context_lens
        self._block_tables[:size, : group.block_tables.shape[1]] = group.block_tables

    def metadata(self, size: int, backend: NativeAttention, block_size: int) -> AttentionMetadata:
        slots, tables = torch.from_numpy(self._slots[:size]), torch.from_numpy(self._block_tables[:size])
        made = AttentionMetadata(slots, [], [], tables)  # lists would not change from replay to replay
        backend.prepare_decodes(made, self._context_lens[:size], block_size)
        return made
