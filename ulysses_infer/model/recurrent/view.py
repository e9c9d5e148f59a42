"""A module as the forward of its own class sees it, with some of its attributes replaced."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import nn


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
        """replaced: by dotted name. functions: of the module's source file, by name; they get the view first."""
        self._module = module
        own = {name: value for name, value in replaced.items() if "." not in name}
        for child in sorted({name.split(".")[0] for name in replaced if "." in name}):
            inner = {name[len(child) + 1 :]: value for name, value in replaced.items() if name.startswith(f"{child}.")}
            own[child] = ModuleView(getattr(module, child), inner)
        vars(self).update(own)
        bound = {name: functools.partial(function, self) for name, function in (functions or {}).items()}
        self._forward = forward or _with_functions(type(module).forward, bound)

    def __getattr__(self, name: str) -> Any:
        method = inspect.getattr_static(type(self._module), name, None)
        if isinstance(method, FunctionType):
            return method.__get__(self)
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's class computes."""
        return self._forward(self, *args, **kwargs)


def _with_functions(function: Callable[..., Any], others: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """`function` as if its module had `others` under their names; the module is not changed."""
    if not others:
        return function
    plain = inspect.unwrap(function)
    assert isinstance(plain, FunctionType)
    names = {**plain.__globals__, **others}
    return FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
