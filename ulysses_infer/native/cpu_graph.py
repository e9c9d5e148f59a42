"""CPU graphs: a recorded step is replayed on the same memory, as CUDA graphs are on a GPU.

Calls into native libraries are replayed in C (cpu_graph.c). Torch operators between them run again, and their results
are copied to the recorded addresses. A replay skips the model's Python code and the allocation of results, which for
small steps take longer than the work itself.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ulysses_infer.native.arena import Arena
from ulysses_infer.native.function import KINDS, NativeFunction, recording
from ulysses_infer.native.library import open_library

ALLOCATIONS = frozenset(getattr(torch.ops.aten, name).default for name in ("empty_like", "new_empty")) | {
    torch.ops.aten.empty.memory_format
}
CONSTANTS = frozenset({torch.ops.aten.lift_fresh.default})
"""Operators that create constants from Python values, which may differ in the next step."""
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
"""Operators with a kernel of this key consist of others."""
HOST_READS = frozenset({torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__})
"""Reads of memory that are no operators, and whose results may differ in the next step."""


class _Call(ctypes.Structure):
    """`struct call` of cpu_graph.c."""

    _fields_ = (("function", ctypes.c_void_p), ("first", ctypes.c_int64), ("kind", ctypes.c_int64))


class _NativeCalls:
    """Consecutive native calls."""

    def __init__(self, nanoseconds: ctypes.Array[ctypes.c_int64]) -> None:
        self.functions: list[NativeFunction] = []
        self._nanoseconds = nanoseconds
        self._arguments: list[int] = []
        self._calls: list[_Call] = []
        self._status = ctypes.c_int()
        self._packed: tuple[Any, Any] | None = None
        self._run = open_library("cpu_graph").cpu_graph_run
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._run.restype = ctypes.c_int64

    def add(self, function: NativeFunction, arguments: tuple[Any, ...]) -> None:
        """Append a call."""
        self._calls.append(_Call(function.entry, len(self._arguments), KINDS.index(function.kind)))
        self._arguments += [_to_int64(kind, value) for kind, value in zip(function.arguments, arguments, strict=True)]
        self.functions.append(function)

    def __call__(self) -> None:
        if self._packed is None:
            arguments = (ctypes.c_int64 * len(self._arguments))(*self._arguments)
            self._packed = (_Call * len(self._calls))(*self._calls), arguments
            self._arguments, self._calls = [], []  # frees memory: there may be hundreds of graphs
        calls, arguments = self._packed
        done = self._run(calls, len(calls), arguments, self._nanoseconds, ctypes.byref(self._status))
        if done < len(calls):
            check = self.functions[done].check
            assert check is not None
            check(self._status.value)


class _HostReads(TorchFunctionMode):
    """Notes in a graph that the host has read a tensor: the step cannot be replayed then."""

    def __init__(self, graph: CpuGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in HOST_READS and recording.recorder is self._graph:
            self._graph.problem = self._graph.problem or f"the host reads a tensor by {function.__name__}"
        return function(*args, **(kwargs or {}))


class CpuGraph(TorchDispatchMode):
    """One recorded step. The tensors that it reads and writes must keep their addresses."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena
        self._parts: list[Callable[[], None]] = []
        self._kept: list[Any] = []  # keeps arguments of native calls alive
        self._nanoseconds = (ctypes.c_int64 * len(KINDS))()
        self.num_native_calls = self.num_torch_calls = 0
        self.problem: str | None = None
        """Why the step cannot be replayed, or None if it can."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this thread runs in the context. It runs normally, even if it cannot be recorded."""
        assert recording.recorder is None
        self._arena.restart()
        recording.recorder = self
        try:
            with self, _HostReads(self):
                yield
        finally:
            recording.recorder = None

    def replay(self) -> None:
        """Run the step again on the current values of its inputs."""
        ctypes.memset(self._nanoseconds, 0, ctypes.sizeof(self._nanoseconds))
        for part in self._parts:
            part()

    def seconds_of(self, kind: str) -> float:
        """Seconds that the last replay spent in native calls of `kind`."""
        return self._nanoseconds[KINDS.index(kind)] * 1e-9

    def record(self, function: NativeFunction, arguments: tuple[Any, ...]) -> None:
        """See `Recorder.record`."""
        last = self._parts[-1] if self._parts else None
        if not isinstance(last, _NativeCalls):
            last = _NativeCalls(self._nanoseconds)
            self._parts.append(last)
        last.add(function, arguments)
        self._kept.append(arguments)
        self.num_native_calls += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if recording.recorder is not self:  # paused
            return result
        if function in ALLOCATIONS:
            return self._arena.empty(tuple(result.shape), result.dtype)
        if _is_view_operator(function):
            return result
        if function._schema.is_mutable and function.namespace == "aten":
            self._add_torch_call(lambda: function(*args, **kwargs))
            return result
        if function not in CONSTANTS and _all_views(result, args):
            return result
        results = _as_tuple(result)
        if not any(isinstance(each, torch.Tensor) for each in (*_tensors(args), *results)):
            return result  # of Python values alone, as `promote_types`
        if not _is_repeatable(function, args) or not all(isinstance(each, torch.Tensor) for each in results):
            self.problem = self.problem or f"{function} cannot be repeated"
            return result
        kept = tuple(self._arena.empty(tuple(each.shape), each.dtype) for each in results)
        _copy_all(kept, results)
        self._add_torch_call(lambda: _copy_all(kept, _as_tuple(function(*args, **kwargs))))
        return kept[0] if isinstance(result, torch.Tensor) else type(result)(kept)

    def _add_torch_call(self, call: Callable[[], Any]) -> None:
        self._parts.append(call)
        self.num_torch_calls += 1


@functools.cache
def _is_view_operator(function: Any) -> bool:
    """Whether all results always share memory with arguments, which it does not change; `reshape` may copy."""
    aliases = [each.alias_info for each in function._schema.returns]
    is_view = bool(aliases) and all(each is not None and not each.is_write for each in aliases)
    return is_view and function not in CONSTANTS and not function.has_kernel_for_dispatch_key(COMPOSITE)


def _is_repeatable(function: Any, args: Any) -> bool:
    """Whether the result has a fixed shape and depends on the values of the arguments only."""
    return (
        function.namespace == "aten"
        and function not in CONSTANTS
        and (torch.Tag.dynamic_output_shape not in function.tags or _selects_by_numbers(function, args))
        and torch.Tag.nondeterministic_seeded not in function.tags
    )


def _selects_by_numbers(function: Any, args: Any) -> bool:
    """Whether tensors of positions select from a tensor: unlike masks, they select a fixed number of elements."""
    return function is torch.ops.aten.index.Tensor and all(
        each is None or each.dtype in (torch.int64, torch.int32) for each in args[1]
    )


def _as_tuple(result: Any) -> tuple[Any, ...]:
    """The results of an operator; several, for example of `topk`, come in a tuple or list."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _copy_all(targets: tuple[torch.Tensor, ...], sources: tuple[torch.Tensor, ...]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _to_int64(kind: str, value: Any) -> int:
    """An argument as the 64-bit integer that is passed in C."""
    if kind == "f":
        return int.from_bytes(struct.pack("f", value), "little")
    if value is None:
        return 0
    if isinstance(value, int):
        return value
    return ctypes.addressof(getattr(value, "_obj", value))  # an object, or ctypes.byref of one


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from _tensors(value)


def _is_view(result: torch.Tensor, args: Any) -> bool:
    """Whether `result` shares memory with an argument, so that its address is the same in a replay."""
    storage = result.untyped_storage().data_ptr()
    return any(storage == given.untyped_storage().data_ptr() for given in _tensors(args))


def _all_views(results: Any, args: Any) -> bool:
    """Whether every tensor of `results` is a view of an argument."""
    results = [results] if isinstance(results, torch.Tensor) else results
    tensors = list(_tensors(results)) if isinstance(results, Sequence) else []
    return bool(tensors) and len(tensors) == len(results) and all(_is_view(each, args) for each in tensors)
