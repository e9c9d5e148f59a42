"""CPU attention backend in C (`native/attention.c`): reads the block tables directly, gathers nothing."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.native.function import ATTENTION, NativeFunction
from ulysses_infer.native.library import open_library


class NativeAttention:
    """One call a layer for all sequences of the step; torch attends for queries longer than `longest_query` tokens.

    A sequence's result depends neither on the rest of the batch nor on the number of threads. Raises
    `NativeUnavailableError` where the library cannot be built.
    """

    name = "native"

    def __init__(self) -> None:
        library = open_library("attention")
        self._functions = {
            torch.bfloat16: NativeFunction(library, "attend_bfloat16", "pp", ATTENTION, _no_memory),
            torch.float32: NativeFunction(library, "attend_float32", "pp", ATTENTION, _no_memory),
        }
        self.longest_query = ctypes.c_int64.in_dll(library, "longest_query").value
        self._torch = TorchLoopAttention()

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        function = self._functions.get(keys.dtype)
        if function is None or query.dtype != keys.dtype:
            return self._torch.attend(query, keys, values, metadata, options)
        output = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
        batch, long = self._split(metadata, keys.shape[1])
        if batch.count:
            layer = _Layer.of(query, keys, values, output, options)
            function(ctypes.byref(batch), ctypes.byref(layer))
        if long:
            self._torch.attend_sequences(long, query, keys, values, metadata, options, output)
        return output

    def fix(self, metadata: AttentionMetadata, contexts: np.ndarray, block_size: int) -> None:
        """Attend for decodes in the step of `metadata`, reading its context lengths from `contexts` [n] int64.

        Whoever makes the same calls again may have written other lengths, and other block tables, in their places.
        """
        index = np.arange(len(contexts))
        batch = _Batch.at(metadata, block_size, index, np.ones_like(index), contexts, index)
        metadata.prepared[self.name] = batch, []

    def _split(self, metadata: AttentionMetadata, block_size: int) -> tuple[_Batch, list[int]]:
        """What the kernel attends for and the numbers of torch's sequences, made by the first layer that asks."""
        made: tuple[_Batch, list[int]] | None = metadata.prepared.get(self.name)
        if made is None:
            lengths = np.array(metadata.query_lens, dtype=np.int64)
            is_short = lengths <= self.longest_query
            batch = _Batch.of(metadata, lengths, np.flatnonzero(is_short), block_size)
            made = metadata.prepared[self.name] = batch, np.flatnonzero(~is_short).tolist()
        return made


class _Batch(ctypes.Structure):
    """`struct batch` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "table_stride", "block_size")),
        *((name, ctypes.c_void_p) for name in ("rows", "lengths", "contexts", "sequences", "tables")),
    )

    @staticmethod
    def of(metadata: AttentionMetadata, lengths: np.ndarray, sequences: np.ndarray, block_size: int) -> _Batch:
        """The `sequences` (their numbers in the batch) of a step whose query lengths are `lengths`."""
        contexts = np.array(metadata.context_lens, dtype=np.int64)
        first = np.cumsum(lengths) - lengths
        return _Batch.at(metadata, block_size, first[sequences], lengths[sequences], contexts[sequences], sequences)

    @staticmethod
    def at(metadata: AttentionMetadata, block_size: int, *arrays: np.ndarray) -> _Batch:
        """Of arrays that lie where the kernel is to read them: rows, lengths, contexts, sequences."""
        tables = metadata.block_tables
        made = _Batch(
            len(arrays[0]), tables.stride(0), block_size, *(array.ctypes.data for array in arrays), tables.data_ptr()
        )
        made.kept = arrays, tables  # alive with the pointers
        return made


class _Layer(ctypes.Structure):
    """`struct layer` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "output", "sinks")),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride", "heads", "groups")),
        *((name, ctypes.c_int64) for name in ("key_width", "value_width", "value_stride", "window", "chunk")),
        *((name, ctypes.c_float) for name in ("scaling", "soft_cap")),
    )

    @staticmethod
    def of(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, output: torch.Tensor, options: AttentionOptions
    ) -> _Layer:
        """One layer of the step. Keys are contiguous; so are values, or each is the beginning of its key."""
        if query.stride(2) != 1:
            query = query.contiguous()
        heads, key_width = keys.shape[2:]
        sinks = None if options.sinks is None else options.sinks.float().contiguous()
        made = _Layer(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            output.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            query.stride(0),
            query.stride(1),
            heads,
            query.shape[1] // heads,
            key_width,
            values.shape[3],
            values.stride(2),
            options.sliding_window or 0,
            options.chunk_size or 0,
            options.scaling,
            options.softcap or 0.0,
        )
        made.kept = query, sinks  # alive with the pointers
        return made


def _no_memory(_: int) -> None:
    raise MemoryError("no memory for the sums of attention")
