"""Functions of transformers' recurrent layers that other packages have in faster forms, for GPUs only.

transformers takes the form of flash-linear-attention, causal-conv1d or mamba-ssm when its modelling code is imported
while that package is installed, on every device. Here its own form in torch runs on the devices without kernels.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch

from ulysses_infer.kernels.launch import capability

DISTRIBUTIONS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}
"""What to install, by the name that is imported."""


class Forms(NamedTuple):
    """What a function of transformers is made of."""

    reference: Callable[..., Any]
    """In torch."""
    package: str
    """That has another form."""
    is_replaced: bool
    """Whether the other form is used, because the package is installed."""


@functools.cache
def forms_of(function: Any) -> Forms | None:
    """The forms of `function`, a global of transformers' modelling code; None if it has one only."""
    if not isinstance(function, FunctionType) or not hasattr(function, "__wrapped__"):
        return None
    inside = inspect.getclosurevars(function).nonlocals
    if not {"implementation", "package"} <= inside.keys():
        return None
    reference = function.__wrapped__
    return Forms(reference, inside["package"], inside["implementation"] is not reference)


def runs_gpu_functions(device: torch.device) -> bool:
    """Whether the packages' kernels run on `device`."""
    return device.type == "cuda" or capability(device) is not None


def chosen(names: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    """Those of the globals `names` that are to be called in another form than transformers'."""
    forms = {name: forms_of(value) for name, value in names.items()}
    return {name: each.reference for name, each in forms.items() if each and not (on_gpu and each.is_replaced)}


def missing_packages(forward: Callable[..., Any]) -> set[str]:
    """Distributions that would make `forward`, of a layer's class, faster on a GPU and are not installed."""
    plain: Any = inspect.unwrap(forward)
    forms = (forms_of(plain.__globals__.get(name)) for name in plain.__code__.co_names)
    return {DISTRIBUTIONS.get(each.package, each.package) for each in forms if each and not each.is_replaced}
