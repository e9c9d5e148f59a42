"""Checks that a step can be captured in a CUDA graph, operator by operator; on device `meta` without a GPU."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ulysses_infer.errors import UlyssesError, first_line

PACKAGE = str(Path(__file__).parents[2])
TORCH = str(Path(torch.__file__).parent)
HOST_READS = frozenset(
    (
        *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount"),
    )
)
"""Operators whose result, or its shape, the host reads from the device."""
COPIES = frozenset(("_to_copy", "copy_", "copy", "_copy_from"))
FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)


class CaptureError(UlyssesError, RuntimeError):
    """A step does something that a CUDA graph cannot capture, or cannot repeat."""


@dataclass(frozen=True)
class Allocation:
    """Memory that an operator of a step allocated."""

    operator: str
    num_bytes: int
    place: str
    """The Python line that called the operator."""
    storage: StorageWeakRef

    @property
    def is_alive(self) -> bool:
        """Whether a tensor still uses it."""
        return not self.storage.expired()


class CaptureChecker(TorchDispatchMode):
    """Within its `with` block, an operator that prevents capture raises `CaptureError`: why, what, where.

    These are host reads of the device, copies between host and device that wait or go through pageable memory, tensors
    of another device, and tensors that grow in place. Numbers and lists of Python are copied like host memory. What
    libraries do outside of torch's operators is not seen.
    """

    def __init__(self, device: torch.device, records_allocations: bool = False, assumes_pinned: bool = False) -> None:
        """device: the step's. records_allocations: also fill `allocations`.

        assumes_pinned: take host memory for pinned, which only a GPU's host has.
        """
        super().__init__()
        self._device, self._records, self._assumes_pinned = device, records_allocations, assumes_pinned
        self._python_values = _PythonValues(device)
        self.allocations: list[Allocation] = []

    def __enter__(self) -> CaptureChecker:
        """Begin to check."""
        self._python_values.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        super().__exit__(*error)
        self._python_values.__exit__(*error)

    @property
    def bytes_by_operator(self) -> Counter[str]:
        """Bytes allocated by each operator."""
        found: Counter[str] = Counter()
        for each in self.allocations:
            found[each.operator] += each.num_bytes
        return found

    def kept(self) -> list[Allocation]:
        """Allocations still in use. A graph allocates from its pool, which other graphs overwrite: none may be kept."""
        return [each for each in self.allocations if each.is_alive]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check one operator and run it."""
        kwargs = kwargs or {}
        if _is_composite(function):  # in inference mode operators are not taken apart before they arrive here
            with self._again():
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = _tensors(args, kwargs)
        reason = _reason(function, args, kwargs, tensors, self._device, self._assumes_pinned)
        if reason is not None:
            raise _error(reason, str(function), tensors)
        storages = [tensor.untyped_storage() for tensor in tensors]
        written = _written_storages(function, args, kwargs)
        result = function(*args, **kwargs)
        if written != _written_storages(function, args, kwargs):
            raise _error("gives a tensor other memory", str(function), tensors)
        if self._records:
            self._record(str(function), {storage._cdata for storage in storages}, result)
        return result

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Check what an operator consists of."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def _record(self, operator: str, known: set[int], result: Any) -> None:
        for tensor in _tensors((result,), {}):
            storage = tensor.untyped_storage()
            if tensor.device.type == self._device.type and storage.nbytes() and storage._cdata not in known:
                self.allocations.append(Allocation(operator, storage.nbytes(), _place(), StorageWeakRef(storage)))


class _PythonValues(TorchFunctionMode):
    """Finds Python values that become tensors of the device: below Python, torch copies them unseen."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check one call and make it."""
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and self._has_list(args[0], args[1]):
            raise _error("copies an index of Python to the device", "indexing", [args[0]])
        result = function(*args, **(kwargs or {}))
        if function in FROM_PYTHON and self._is_copied(args, result):
            raise _error("copies a value of Python to the device", function.__name__, [result])
        return result

    def _has_list(self, tensor: torch.Tensor, index: Any) -> bool:
        indices = index if isinstance(index, tuple) else (index,)
        return tensor.device.type == self._device.type != "cpu" and any(isinstance(each, list) for each in indices)

    def _is_copied(self, args: Any, result: torch.Tensor) -> bool:
        value = args[-1] if args else None
        return result.device.type == self._device.type != "cpu" and not isinstance(value, torch.Tensor)


def find_cause(step: Callable[[], None], device: torch.device) -> str | None:
    """Run `step`, which could not be captured, and say which operator prevents it; None if none is found."""
    try:
        with CaptureChecker(device):
            step()
    except CaptureError as error:
        return first_line(error)
    except RuntimeError:
        return None
    return None


# -- what prevents capture -----------------------------------------------------------------------------------------


def _is_composite(function: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")


def _reason(
    function: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], device: torch.device, assumes_pinned: bool
) -> str | None:
    name = function.overloadpacket.__name__
    if name in COPIES:
        return _reason_of_copy(name, args, kwargs, device, assumes_pinned)
    own = [tensor for tensor in tensors if tensor.device.type == device.type]
    if not own:
        return None
    if name in HOST_READS or (name.startswith("repeat_interleave") and _has_unknown_size(function, kwargs)):
        return "reads from the device"
    if name.startswith("index") and _has_mask(name, args):
        return "reads a mask from the device"
    if any(tensor.dim() and not _is_on(tensor.device, device) for tensor in tensors):
        return f"mixes tensors of {' and '.join(sorted({str(tensor.device) for tensor in tensors}))}"
    return None


def _reason_of_copy(name: str, args: Any, kwargs: Any, device: torch.device, assumes_pinned: bool) -> str | None:
    makes = name == "_to_copy"  # the others write to their first argument
    source, target = (args[0], args[0]) if makes else (args[1], args[0])
    origin, goal = source.device, torch.device(kwargs.get("device") or target.device) if makes else target.device
    if device.type not in (origin.type, goal.type):
        return None
    way = f"from {origin} to {goal}"
    if origin.type == goal.type:
        return None if None in (origin.index, goal.index) or origin == goal else f"copies {way}"
    if origin.type == "cpu":
        is_pinned = source.is_pinned()
    else:
        is_pinned = kwargs.get("pin_memory", False) if makes else target.is_pinned()
    if not (is_pinned or assumes_pinned):
        return f"copies {way} through pageable memory"
    waits = not (kwargs.get("non_blocking", False) or (not makes and any(args[2:3])))
    return f"waits for a copy {way}" if waits else None


def _has_unknown_size(function: Any, kwargs: Any) -> bool:
    return function._overloadname == "Tensor" and kwargs.get("output_size") is None


def _has_mask(name: str, args: Any) -> bool:
    """Whether an index is a mask. One value written through a mask does not need the mask's places."""
    if len(args) < 2 or not isinstance(args[1], list | tuple):
        return False
    if name.startswith("index_put") and args[2].numel() == 1 and not any(args[3:4]):
        return False
    return any(isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1])


def _is_on(found: torch.device, device: torch.device) -> bool:
    return found.type == device.type and (device.index is None or found.index == device.index)


def _written_storages(function: Any, args: Any, kwargs: Any) -> list[tuple[int, int]]:
    """Identity and size of the memory of each tensor that the operator writes."""
    schema = function._schema
    if not schema.is_mutable:
        return []
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    written = [given.get(argument.name) for argument in schema.arguments if argument.is_write]
    storages = [tensor.untyped_storage() for tensor in tree_leaves(written) if isinstance(tensor, torch.Tensor)]
    return [(storage._cdata, storage.nbytes()) for storage in storages]


# -- where it was called -------------------------------------------------------------------------------------------


def _error(reason: str, operator: str, tensors: list[torch.Tensor]) -> CaptureError:
    shapes = ", ".join(f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in tensors)
    return CaptureError(f"{operator}({shapes}) {reason}, at {_place()}")


def _place() -> str:
    """The innermost line outside torch, and the line of this package that led to it."""
    outside = [frame for frame in _frames() if not frame.f_code.co_filename.startswith((TORCH, __file__))]
    if not outside:
        return "?"
    own = next((frame for frame in outside if frame.f_code.co_filename.startswith(PACKAGE)), outside[0])
    return _line(own) if own is outside[0] else f"{_line(outside[0])}, called from {_line(own)}"


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    shown = path.relative_to(Path(PACKAGE).parent) if path.is_relative_to(PACKAGE) else Path(*path.parts[-3:])
    return f"{shown}:{frame.f_lineno}"


def _tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
