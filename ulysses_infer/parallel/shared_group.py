"""A process group over shared memory (`native/collectives.c`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Array, c_char_p, c_int, c_int64, c_void_p
from itertools import accumulate

import torch

from ulysses_infer.kernels.scaled_rows import QuantisedRows
from ulysses_infer.native.function import ALL_REDUCE, ALL_TO_ALL, GATHER, NativeFunction, is_recording
from ulysses_infer.parallel.layout import Span

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
"""Types that can be summed; 16-bit types are accumulated in float32."""
LOST, TIMED_OUT, TOO_WIDE, CLOSED = 1, 2, 3, 4
MOST_PIECES = 8
FIRST_CAPACITY = 64 * 1024


class AllToAllPiece(ctypes.Structure):
    """One tensor of an all-to-all, `struct piece` in collectives.c; sizes and strides are in bytes, except `heads`."""

    _fields_ = (
        ("source", c_void_p),
        ("target", c_void_p),
        ("heads", c_int64),
        ("head_bytes", c_int64),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
    )


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the signatures of collectives.c to ctypes."""
    signatures = {
        "group_send": [c_void_p, c_char_p, c_int64],
        "group_receive": [c_void_p, c_void_p, c_int64, POINTER(c_int64)],
        "memory_unmap": [c_void_p, c_int64],
        "group_limit": [c_void_p, c_int64],
        "group_patience": [c_void_p, c_int64, c_int64],
        "group_close": [c_void_p],
    }
    for name, arguments in signatures.items():
        getattr(library, name).argtypes = arguments
    library.memory_map.argtypes, library.memory_map.restype = [c_int, c_int64], c_void_p
    library.group_bytes.argtypes, library.group_bytes.restype = [c_int, c_int, c_int64], c_int64
    library.group_open.restype = c_void_p
    library.group_open.argtypes = [
        c_void_p,
        c_int,
        c_int,
        c_int,
        c_int64,
        POINTER(c_void_p),
        POINTER(c_int),
        c_int64,
        c_int64,
    ]
    return library


class SharedMemoryEndpoint:
    """This rank's endpoint of a process group or mailbox in shared memory. `ranks`: those of the job that share it."""

    def __init__(self, library: ctypes.CDLL, handle: int, ranks: list[int], mine: int) -> None:
        self.ranks, self._library, self._mine = ranks, library, mine
        self.handle: int | None = handle
        """Pointer to the C struct; None once this rank has left."""

    def _check(self, status: int) -> None:
        """Raise RuntimeError if a wait failed, with the wording of gloo's errors, which `failure_reason` recognises."""
        if status == 0:
            return
        reason, rank = status & 0xFF, self.ranks[status >> 8]
        raise RuntimeError(
            {
                LOST: f"Connection closed by peer: rank {rank} has left or its process has ended",
                TIMED_OUT: f"Timed out waiting for rank {rank}",
                TOO_WIDE: "a single row of this exchange is larger than a slot of the shared memory",
                CLOSED: "this rank has left the process group",
            }[reason]
        )


class SharedMemoryGroup(SharedMemoryEndpoint):
    """A `ProcessGroup` over shared memory. Not thread-safe."""

    def __init__(self, library: ctypes.CDLL, handle: int, ranks: list[int], mine: int) -> None:
        super().__init__(library, handle, ranks, mine)
        self._starts = (c_int64 * (len(ranks) + 1))()
        self._pieces = (AllToAllPiece * MOST_PIECES)()
        self._sum = NativeFunction(library, "group_sum", "ppii", ALL_REDUCE, self._check)
        self._tokens_to_heads = NativeFunction(library, "group_tokens_to_heads", "pppi", ALL_TO_ALL, self._check)
        self._heads_to_tokens = NativeFunction(library, "group_heads_to_tokens", "ppppi", ALL_TO_ALL, self._check)
        self._gather = NativeFunction(library, "group_gather", "pppp", ALL_TO_ALL, self._check)
        self._gather_to_first = NativeFunction(library, "group_gather_to_first", "pppi", GATHER, self._check)

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """All-reduce in place, in group order and at least float32; returns `partial`.

        Raises `TypeError` if the tensor is not floating-point.
        """
        if not partial.is_contiguous():
            return partial.copy_(self.sum(partial.contiguous()))
        kind = KINDS.get(partial.dtype)
        if kind is None:
            raise TypeError(f"tensors of {partial.dtype} cannot be summed in shared memory")
        self._sum(self.handle, partial.data_ptr(), partial.numel(), kind)
        return partial

    def sum_add_norm(
        self, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: int
    ) -> torch.Tensor | QuantisedRows | None:
        """None: see `ProcessGroup.sum_add_norm`."""
        return None

    def tokens_to_heads(self, sources: Sequence[torch.Tensor], tokens: Sequence[Span]) -> list[torch.Tensor]:
        """sources: each [t, n * h, d]; returns each as [T, h, d], dense."""
        starts, size = self._bounds([span.stop for span in tokens]), len(self.ranks)
        pieces = (AllToAllPiece * MOST_PIECES)() if is_recording() else self._pieces
        targets = []
        for piece, source in zip(pieces, sources, strict=False):
            _, heads, width = source.shape
            target = source.new_empty(tokens[-1].stop, heads // size, width)
            token_stride, head_stride, stride = source.stride()
            assert stride == 1, source.stride()
            item = source.itemsize
            piece.source, piece.target = source.data_ptr(), target.data_ptr()
            piece.heads, piece.head_bytes = heads // size, width * item
            piece.token_stride, piece.head_stride = token_stride * item, head_stride * item
            targets.append(target)
        self._tokens_to_heads(self.handle, starts, pieces, len(targets))
        return targets

    def heads_to_tokens(self, output: torch.Tensor, tokens: Sequence[Span]) -> torch.Tensor:
        """output: [T, C]; returns [t, n * C]."""
        output = output.contiguous()
        width, starts = output.shape[1], self._bounds([span.stop for span in tokens])
        target = output.new_empty(tokens[self._mine].size, len(tokens) * width)
        row = width * output.itemsize
        self._heads_to_tokens(self.handle, starts, output.data_ptr(), target.data_ptr(), row)
        return target

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """rows: [counts[mine], D]; returns [sum(counts), D]."""
        rows = rows.contiguous()
        row, stops = rows.shape[1] * rows.itemsize, list(accumulate(counts))
        target = rows.new_empty(stops[-1], rows.shape[1])
        starts = self._bounds([stop * row for stop in stops])
        self._gather(self.handle, starts, rows.data_ptr(), target.data_ptr())
        return target

    def _bounds(self, stops: list[int]) -> Array[c_int64]:
        """[0, *stops]. While a CPU graph is recorded, a new array that it keeps."""
        starts = (c_int64 * (len(self.ranks) + 1))() if is_recording() else self._starts
        for index, stop in enumerate(stops, start=1):
            starts[index] = stop
        return starts

    def gather_to_first(self, shard: torch.Tensor) -> torch.Tensor | None:
        """Gather every rank's `shard` on the first, [n, *shape]; None elsewhere."""
        shard = shard.contiguous()
        is_first = self._mine == 0
        target = shard.new_empty(len(self.ranks), *shard.shape) if is_first else shard
        self._gather_to_first(self.handle, shard.data_ptr(), target.data_ptr(), shard.nbytes)
        return target if is_first else None


class SharedMemoryMailbox(SharedMemoryEndpoint):
    """A `Mailbox` in shared memory. Rank 0 may be several messages ahead of the other ranks."""

    def __init__(self, library: ctypes.CDLL, handle: int, ranks: list[int], mine: int) -> None:
        super().__init__(library, handle, ranks, mine)
        self._buffer = ctypes.create_string_buffer(FIRST_CAPACITY)
        self._length = c_int64()

    def send(self, message: bytes) -> None:
        """See `Mailbox.send`."""
        self._check(self._library.group_send(self.handle, message, len(message)))

    def receive(self) -> bytes:
        """See `Mailbox.receive`."""
        receive = self._library.group_receive
        self._check(receive(self.handle, self._buffer, len(self._buffer), self._length))
        if self._length.value > len(self._buffer):
            self._buffer = ctypes.create_string_buffer(self._length.value)
            self._check(receive(self.handle, self._buffer, len(self._buffer), self._length))
        return ctypes.string_at(self._buffer, self._length.value)
