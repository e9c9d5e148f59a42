"""CPU attention backend in C (`native/attention/attention.c`): reads the block tables directly, gathers nothing."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.native.function import ATTENTION, NativeFunction
from ulysses_infer.native.library import open_library


class NativeAttention:
    """One call per layer for all sequences of the step; torch attends for those of more than `longest_query` queries.

    A request's result depends neither on the rest of the batch nor on the number of threads. Drafted tokens, which are
    sequences of one token with the block table of their request, are attended together. Raises
    `NativeUnavailableError` if the library cannot be built.
    """

    name = "native"

    def __init__(self) -> None:
        library = open_library("attention")
        self._functions = {
            torch.bfloat16: NativeFunction(library, "attend_bfloat16", "pp", ATTENTION, _raise_memory_error),
            torch.float32: NativeFunction(library, "attend_float32", "pp", ATTENTION, _raise_memory_error),
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
            layer = _LayerArguments.of(query, keys, values, output, options)
            function(ctypes.byref(batch), ctypes.byref(layer))
        if long:
            self._torch.attend_sequences(long, query, keys, values, metadata, options, output)
        return output

    def prepare_decodes(self, metadata: AttentionMetadata, contexts: np.ndarray, block_size: int) -> None:
        """Prepare a decode step whose context lengths are read from `contexts` [n] int64 whenever it runs.

        A CPU graph writes new lengths and block tables in place before each replay.
        """
        index = np.arange(len(contexts))
        batch = _Batch.at(metadata, block_size, index, np.ones_like(index), contexts, index)
        metadata.prepared[self.name] = batch, []

    def attend_recorded(self, metadata: AttentionMetadata, sequences: RecordedSequences) -> None:
        """Let a step's layers attend for `sequences`, which are filled anew before each replay of a CPU graph.

        Only where no sequence can be longer than `longest_query`.
        """
        metadata.prepared[self.name] = sequences.batch, []

    def _split(self, metadata: AttentionMetadata, block_size: int) -> tuple[_Batch, list[int]]:
        """The sequences of the kernel, and the indices of those left to torch. Computed once per step."""
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
        """A batch of the `sequences` (indices) of a step whose query lengths are `lengths`."""
        contexts = np.array(metadata.context_lens, dtype=np.int64)
        first = np.cumsum(lengths) - lengths
        return _Batch.at(metadata, block_size, first[sequences], lengths[sequences], contexts[sequences], sequences)

    @staticmethod
    def at(metadata: AttentionMetadata, block_size: int, *arrays: np.ndarray) -> _Batch:
        """A batch that refers to `arrays` (rows, lengths, contexts, sequences) in place."""
        tables = metadata.block_tables
        made = _Batch(
            len(arrays[0]), tables.stride(0), block_size, *(array.ctypes.data for array in arrays), tables.data_ptr()
        )
        made.kept = arrays, tables  # keeps the memory alive
        return made


class RecordedSequences:
    """Sequences of a recorded step in fixed memory."""

    def __init__(self, tables: torch.Tensor, block_size: int) -> None:
        """tables: [most sequences, most blocks] int64, read in place."""
        self._first, self._lengths, self._contexts, index = np.zeros((4, len(tables)), dtype=np.int64)
        index[:] = np.arange(len(tables))
        metadata = AttentionMetadata(torch.empty(0), [], [], tables)
        self.batch = _Batch.at(metadata, block_size, self._first, self._lengths, self._contexts, index)

    def fill(self, lengths: np.ndarray, contexts: np.ndarray) -> None:
        """The next step's sequences. lengths, contexts: [n] int64, query and context tokens of each."""
        count = self.batch.count = len(lengths)
        self._first[:count] = np.cumsum(lengths) - lengths
        self._lengths[:count], self._contexts[:count] = lengths, contexts


class _LayerArguments(ctypes.Structure):
    """`struct layer` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "output", "sinks", "alibi", "relative")),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride", "heads", "groups")),
        *((name, ctypes.c_int64) for name in ("key_width", "value_width", "value_stride", "window", "chunk")),
        *((name, ctypes.c_int64) for name in ("sink_row", "extent")),
        *((name, ctypes.c_float) for name in ("scaling", "soft_cap")),
    )

    @staticmethod
    def of(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, output: torch.Tensor, options: AttentionOptions
    ) -> _LayerArguments:
        """One layer. Keys are contiguous; values too, unless each is the beginning of its key (latents)."""
        if query.stride(2) != 1:
            query = query.contiguous()
        heads, key_width = keys.shape[2:]
        sinks, slopes, relative = _floats(options.sinks), _floats(options.alibi), _floats(options.relative)
        made = _LayerArguments(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            output.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            None if slopes is None else slopes.data_ptr(),
            None if relative is None else relative.data_ptr(),
            query.stride(0),
            query.stride(1),
            heads,
            query.shape[1] // heads,
            key_width,
            values.shape[3],
            values.stride(2),
            options.sliding_window or 0,
            options.chunk_size or 0,
            0 if sinks is None or sinks.dim() == 1 else sinks.shape[1],
            0 if relative is None else relative.shape[2],
            options.scaling,
            options.softcap or 0.0,
        )
        made.kept = query, sinks, slopes, relative  # keeps the memory alive
        return made


def _floats(per_head: torch.Tensor | None) -> torch.Tensor | None:
    return None if per_head is None else per_head.float().contiguous()


def _raise_memory_error(_: int) -> None:
    raise MemoryError("out of memory for attention sums")
