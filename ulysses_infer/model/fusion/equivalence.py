"""Proves that two modules compute the same, on recorded inputs and scaled copies of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FACTORS = (1.0, 50.0, 0.02)  # a clamp shows on large values, an epsilon on small ones
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-5, torch.bfloat16: 3e-4}
"""Largest mean difference relative to the mean value. Allows for a few different roundings."""
MISMATCH_ERRORS = (TypeError, AttributeError, LookupError, RuntimeError, ValueError)
"""Errors raised if a replacement does not match the interface of the original."""


@dataclass(frozen=True)
class Call:
    """The inputs of a module call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def times(self, factor: float) -> Call:
        """The same call with its hidden states multiplied by `factor`."""
        if self.args:
            return Call((self.args[0] * factor, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, "hidden_states": self.kwargs["hidden_states"] * factor})

    @property
    def hidden_states(self) -> Any:
        """The first input."""
        return self.args[0] if self.args else self.kwargs.get("hidden_states")


@contextmanager
def record_calls(modules: list[nn.Module]) -> Iterator[dict[nn.Module, Call]]:
    """Record the first call of each of `modules` within the `with` block."""
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, Call(args, kwargs))

    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


def is_equivalent_on(
    call: Call, source: Callable[..., Any], replacement: Callable[..., Any], factors: Sequence[float] = FACTORS
) -> bool:
    """Whether both compute the same on `call`, with its hidden states multiplied by each of `factors`."""
    for factor in factors:
        scaled = call.times(factor)
        try:
            found = _tensors(replacement(*scaled.args, **scaled.kwargs))
        except MISMATCH_ERRORS:
            return False
        expected = _tensors(source(*scaled.args, **scaled.kwargs))
        if len(found) != len(expected) or not all(map(is_close, found, expected)):
            return False
    return True


def is_close(found: torch.Tensor, expected: torch.Tensor, rounding: torch.dtype | None = None) -> bool:
    """Whether two results agree up to rounding. On device `meta` there are no values, and shape and dtype decide.

    rounding: the dtype of what they were computed from, if it is less precise than their own.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if expected.is_meta:
        return True
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    if not bool(expected.isfinite().all()):
        return False
    difference = (found.float() - expected.float()).abs().mean()
    return bool(difference <= TOLERANCE[rounding or expected.dtype] * expected.float().abs().mean())


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tensors among a module's outputs."""
    return [each for each in (output if isinstance(output, tuple) else (output,)) if isinstance(each, torch.Tensor)]
