"""A module as the forward of its own class sees it, with some of its attributes replaced."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ulysses_infer.model.recurrent.gpu_functions import chosen, runs_gpu_functions


class ModuleView:
    """Runs the forward of a module's class with other attributes, or other functions, in place of some.

    The module itself keeps its parts, under their names.
    """

    def __init__(
        self,
        module: nn.Module,
        replaced: Mapping[str, Any],
        functions: Mapping[str, Callable[..., Any]] | None = None,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        """replaced: by dotted name. functions: see `Rule.functions`."""
        self._module = module
        own = {name: value for name, value in replaced.items() if "." not in name}
        for child in sorted({name.split(".")[0] for name in replaced if "." in name}):
            inner = {name[len(child) + 1 :]: value for name, value in replaced.items() if name.startswith(f"{child}.")}
            own[child] = ModuleView(getattr(module, child), inner)
        vars(self).update(own)
        self.states: Any = None
        """Those of the current run."""
        own_forward = type(module).forward
        self._forwards = {
            on_gpu: forward or self._with_functions(own_forward, functions or {}, on_gpu) for on_gpu in (False, True)
        }

    def __getattr__(self, name: str) -> Any:
        method = inspect.getattr_static(type(self._module), name, None)
        if isinstance(method, FunctionType):
            return method.__get__(self)
        return getattr(self._module, name)

    def __call__(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the module's class computes."""
        return self._forwards[runs_gpu_functions(inputs.device)](self, inputs, *args, **kwargs)

    def _with_functions(
        self, forward: Callable[..., Any], others: Mapping[str, Callable[..., Any]], on_gpu: bool
    ) -> Callable[..., Any]:
        """`forward` as if its source file had `others` under their names; the file's module is not changed."""
        plain = inspect.unwrap(forward)
        assert isinstance(plain, FunctionType)
        used = {name: plain.__globals__[name] for name in plain.__code__.co_names if name in plain.__globals__}
        for_device = chosen(used, on_gpu)
        if not others and not for_device:
            return forward
        names = {**plain.__globals__, **for_device}
        names |= {name: functools.partial(other, self, names[name]) for name, other in others.items()}
        return FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
