"""Counts what a step launches on a GPU without one: torch's operators and Triton kernels on device `meta`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ulysses_infer.kernels.launch import counted
from ulysses_infer.kernels.scaled_rows import QuantisedRows
from ulysses_infer.parallel.collectives import Collectives
from ulysses_infer.parallel.layout import Place, Span
from ulysses_infer.parallel.null import NullProcessGroup

FACTORIES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
WITHOUT_KERNEL = frozenset((*FACTORIES, "alias", "detach", "detach_", "lift_fresh", "_unsafe_view"))
"""Operators that return a tensor of the device without launching a kernel; views are recognised by their schema."""


@dataclass(frozen=True)
class StepLaunches:
    """What one step launched. Exchanges between ranks are counted on their own, with all that they launch."""

    kernels: Counter[str]
    exchanges: Counter[str]
    marks: list[tuple[Counter[str], Counter[str]]]
    """Kernels and exchanges up to the attention of each layer."""

    @property
    def kernels_per_layer(self) -> float:
        """Kernels from the attention of one layer to that of the next, on average; 0 if there is only one."""
        return self._per_layer(0)

    @property
    def exchanges_per_layer(self) -> float:
        """Exchanges from the attention of one layer to that of the next, on average."""
        return self._per_layer(1)

    @property
    def of_a_layer(self) -> Counter[str]:
        """The kernels from the attention of the first layer to that of the second."""
        return self.marks[1][0] - self.marks[0][0]

    def _per_layer(self, kind: int) -> float:
        if len(self.marks) < 2:
            return 0.0
        return (self.marks[-1][kind].total() - self.marks[0][kind].total()) / (len(self.marks) - 1)


class LaunchCounter:
    """Counts the launches of steps on device `meta`.

    An operator of torch counts as one kernel, which for a few (sorting, for example) is less than the truth.
    """

    def __init__(self) -> None:
        self._kernels: Counter[str] = Counter()
        self._exchanges: Counter[str] = Counter()
        self._marks: list[tuple[Counter[str], Counter[str]]] = []

    def count(self, step: Callable[[], Any]) -> StepLaunches:
        """Run `step` and count."""
        self._kernels, self._exchanges, self._marks = Counter(), Counter(), []
        with counted(self._kernels), _Operators(self._kernels):
            step()
        found = StepLaunches(self._kernels, self._exchanges, self._marks)
        self._kernels, self._exchanges, self._marks = Counter(), Counter(), []  # of steps that are not counted
        return found

    def mark(self) -> None:
        """Note the counts so far: the attention of the next layer begins."""
        self._marks.append((self._kernels.copy(), self._exchanges.copy()))

    @contextmanager
    def exchange(self, kind: str) -> Iterator[None]:
        """What happens within the `with` block counts as one exchange of `kind`."""
        kernels = self._kernels.copy()
        yield
        self._kernels.clear()
        self._kernels.update(kernels)
        self._exchanges[kind] += 1


class _Operators(TorchDispatchMode):
    """Adds the operators of torch that launch a kernel to `counter`."""

    def __init__(self, counter: Counter[str]) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if launches_kernel(function, result):
            self._counter[function.overloadpacket.__name__] += 1
        return result


def launches_kernel(function: Any, result: Any) -> bool:
    """Whether an operator that returned `result` launches a kernel on the device."""
    if function.is_view or function.overloadpacket.__name__ in WITHOUT_KERNEL:
        return False
    return any(isinstance(leaf, torch.Tensor) and leaf.is_meta and leaf.numel() > 0 for leaf in tree_leaves(result))


class CountedProcessGroup(NullProcessGroup):
    """A process group without other ranks whose exchanges are counted, as if the GPUs had symmetric memory or not."""

    def __init__(self, size: int, index: int, counter: LaunchCounter, symmetric: bool = False) -> None:
        super().__init__(size, index)
        self._counter, self._symmetric = counter, symmetric

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """See `ProcessGroup.sum`."""
        with self._counter.exchange("all-reduce"):
            return super().sum(partial)

    def sum_add_norm(
        self, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: int
    ) -> torch.Tensor | QuantisedRows | None:
        """See `ProcessGroup.sum_add_norm`."""
        from ulysses_infer.kernels.norm import empty_normed
        from ulysses_infer.parallel.symmetric_group import fuses_norm, one_shot_bytes

        if not (self._symmetric and fuses_norm(partial, residual, weight, kind, one_shot_bytes(len(self.ranks)))):
            return None
        with self._counter.exchange("all-reduce + norm"):
            return empty_normed(partial, kind)[0]

    def tokens_to_heads(self, sources: Sequence[torch.Tensor], tokens: Sequence[Span]) -> list[torch.Tensor]:
        """See `ProcessGroup.tokens_to_heads`."""
        with self._counter.exchange("all-to-all"):
            return super().tokens_to_heads(sources, tokens)

    def heads_to_tokens(self, output: torch.Tensor, tokens: Sequence[Span]) -> torch.Tensor:
        """See `ProcessGroup.heads_to_tokens`."""
        with self._counter.exchange("all-to-all"):
            return super().heads_to_tokens(output, tokens)

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """See `ProcessGroup.gather_rows`."""
        with self._counter.exchange("all-gather"):
            return super().gather_rows(rows, counts)


def counted_collectives(place: Place, counter: LaunchCounter, symmetric: bool = False) -> Collectives:
    """The collectives of `place`'s mode without communication, counted. symmetric: as with symmetric memory."""
    sp, tp = place.mode
    return Collectives(
        place,
        CountedProcessGroup(sp, place.token_index, counter, symmetric) if sp > 1 else None,
        CountedProcessGroup(tp, place.weight_index, counter, symmetric) if tp > 1 else None,
    )
