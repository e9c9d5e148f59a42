"""Where quantised layers enter a model: layers are marked before it is injected, and made when they are replaced."""

from __future__ import annotations

from typing import Any

from torch import nn

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.experts import is_experts, scales_inputs
from ulysses_infer.model.linear import Cut, ShiftLinear, is_linear
from ulysses_infer.model.quantization.formats import Quantization
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.quantization.scheme import Scheme
from ulysses_infer.parallel.layout import Place
from ulysses_infer.parallel.sharding import Part, Sharding

MARK = "quantization_scheme"  # an attribute of linear layers, which are replaced by layers that keep it


def mark_quantised(model: Any, quantization: Quantization) -> None:
    """Note on every linear layer of a model without weights how its checkpoint stores it.

    Raises `UnsupportedModelError` for layers that are quantised and cannot be served so.
    """
    head, method = model.get_output_embeddings(), quantization.method
    for name, module in model.named_modules():
        experts = f"{name}.experts" if scales_inputs(module) else name if is_experts(module) else None
        if experts is not None and quantization.scheme_of(f"{experts}.0.gate_proj") is not None:
            raise UnsupportedModelError(
                f"the experts {experts} are quantized by {method}; only experts that the checkpoint leaves alone are "
                "served: use its bfloat16 release"
            )
        if not is_linear(module) or (module is head and not quantization.head):
            continue
        scheme = quantization.scheme_of(name)
        if scheme is None:
            continue
        if module is head or type(module) is not nn.Linear:
            kind = "vocabulary head" if module is head else type(module).__name__
            raise UnsupportedModelError(f"{name} ({kind}) is quantized by {method}, which this engine cannot slice")
        setattr(module, MARK, scheme)


def shift_linear(source: nn.Module, cut: Cut, sharding: Sharding, base: Place) -> ShiftLinear | QuantizedLinear:
    """The layer that takes the place of `source`: a quantised one where its checkpoint is."""
    scheme: Scheme | None = getattr(source, MARK, None)
    if scheme is None:
        return ShiftLinear(source, cut, sharding, base)
    assert isinstance(source, nn.Linear)
    return QuantizedLinear(source, scheme, cut, sharding, base)


def replace_whole(model: nn.Module, base: Place) -> dict[str, QuantizedLinear]:
    """Replace the quantised layers that no rule cuts by ones that every rank has in full; returns them by name."""
    replaced = {}
    for name, module in list(model.named_modules()):
        scheme: Scheme | None = getattr(module, MARK, None)
        if scheme is not None:
            assert isinstance(module, nn.Linear)
            whole = Sharding((Part(1, module.out_features, shared=True),))  # one unit, which every slice shares
            replaced[name] = QuantizedLinear(module, scheme, "column", whole, base)
            model.set_submodule(name, replaced[name])
    return replaced
