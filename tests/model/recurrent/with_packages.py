"""Recurrent layers as on a GPU with fla, causal-conv1d and mamba-ssm: prints what they called, and the errors, as JSON.

A process of its own, because transformers looks for the packages when its modelling code is imported. Each function of
the packages has the signature of the real one, and computes what transformers' own form computes.
"""

from __future__ import annotations

import inspect
import json
import sys
from types import ModuleType
from typing import Any

import torch

from tests.attention.signatures import KINDS, Parameters
from tests.model.recurrent.recurrent_signatures import kept

KERNELS = {
    "fla-core==0.6.0": "fla",
    "causal-conv1d==1.7.0": "causal_conv1d",
    "mamba-ssm==2.3.2.post1": "mamba_ssm",
}
MODULES = {
    "chunk_gated_delta_rule": "ops.gated_delta_rule",
    "fused_recurrent_gated_delta_rule": "ops.gated_delta_rule",
    "chunk_kda": "ops.kda",
    "fused_recurrent_kda": "ops.kda",
    "selective_scan_fn": "ops.selective_scan_interface",
    "selective_state_update": "ops.triton.selective_state_update",
    "mamba_chunk_scan_combined": "ops.triton.ssd_combined",
    "mamba_split_conv1d_scan_combined": "ops.triton.ssd_combined",
    "mamba_inner_fn": "ops.selective_scan_interface",
}
"""Where transformers looks for each function in its package."""
called: list[str] = []
references: dict[str, Any] = {}
"""By the packages' names: transformers' own forms, of the layer that is tested."""


def fake(name: str, parameters: Parameters) -> Any:
    """A function with the real signature."""
    empty = inspect.Parameter.empty
    signature = inspect.Signature(
        [inspect.Parameter(each, KINDS[kind], default=empty if needed else None) for each, kind, needed in parameters]
    )

    def function(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        called.append(name)
        return references[name](*args, **kwargs)

    vars(function)["__signature__"] = signature
    return function


def install() -> None:
    """Make the packages importable."""
    for release, functions in kept().items():
        package = sys.modules.setdefault(KERNELS[release], ModuleType(KERNELS[release]))
        for name, parameters in functions.items():
            module, path = package, package.__name__
            for part in filter(None, MODULES.get(name, "").split(".")):
                path = f"{path}.{part}"
                inner = sys.modules.setdefault(path, ModuleType(path))
                setattr(module, part, inner)
                module = inner
            setattr(module, name, fake(name, parameters))


def compare(kind: str) -> dict[str, Any]:
    """Run a layer of `kind` with and without the packages."""
    from tests.native.recurrent_layers import SHAPES, make_layer
    from ulysses_infer.cache.states import StateCache, StateSequences
    from ulysses_infer.kernels.launch import assume
    from ulysses_infer.model.recurrent.gpu_functions import forms_of, missing_packages
    from ulysses_infer.model.recurrent.runs import runs_of

    layer = make_layer(kind, torch.float32, SHAPES.get(kind, {}))
    forward: Any = inspect.unwrap(type(layer.module).forward)
    references.clear()
    for name in forward.__code__.co_names:
        forms = forms_of(forward.__globals__.get(name))
        if forms is not None:
            inside = inspect.getclosurevars(forward.__globals__[name]).nonlocals
            references[inside["func_name"]] = forms.reference
    error, used = 0.0, dict[str, list[str]]()
    for length in (1, 5):
        run = runs_of(StateSequences(torch.tensor([2, 0]), [length] * 2))[0]
        inputs = [torch.randn(2 * length, width) for width in layer.own_widths]
        caches = [StateCache(layer.state_shapes, 3, torch.device("cpu")) for _ in range(2)]
        for cache in caches:
            cache.clear(torch.arange(3))
        called.clear()
        plain = layer.run_inner(caches[0], run, inputs)
        assert not called, "off GPUs, the packages are not called"
        with assume("cpu", (9, 0)):
            fast = layer.run_inner(caches[1], run, inputs)
        used[str(length)] = sorted(called)
        pairs = [(plain, fast)]
        keys = [(shape.layer, shape.kind, shape.index) for shape in layer.state_shapes]
        pairs += [(caches[0].state(*key), caches[1].state(*key)) for key in keys]
        error = max(error, *(float((one - other).abs().max()) for one, other in pairs))
    return {"called": used, "error": error, "missing": sorted(missing_packages(type(layer.module).forward))}


def main() -> None:
    """For each kind named on the command line."""
    install()
    with torch.inference_mode():
        print(json.dumps({kind: compare(kind) for kind in sys.argv[1:]}))


if __name__ == "__main__":
    main()
