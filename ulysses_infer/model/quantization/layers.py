"""Marks the quantized layers of a model before it is adapted, and creates them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.experts import is_experts, scales_inputs
from ulysses_infer.model.layers.linear import Cut, ShiftLinear, is_linear
from ulysses_infer.model.quantization.expert_scheme import EXPERTS_MARK
from ulysses_infer.model.quantization.formats import Quantization
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.quantization.scheme import MARK, Scheme
from ulysses_infer.parallel.layout import Place
from ulysses_infer.parallel.sharding import Part, Sharding


def mark_quantised(model: Any, quantization: Quantization) -> None:
    """Mark every linear layer and experts module of an empty model with the way its checkpoint stores it.

    Raises `UnsupportedModelError` for quantized layers that cannot be served.
    """
    head, method = model.get_output_embeddings(), quantization.method
    for name, module in model.named_modules():
        if is_experts(module):
            _mark_experts(name, module, quantization)
        elif scales_inputs(module):
            _mark_experts(f"{name}.experts", module.experts, quantization)
        if not is_linear(module) or (module is head and not quantization.head):
            continue
        scheme = quantization.scheme_of(name)
        if scheme is None:
            continue
        if module is head or type(module) is not nn.Linear:
            kind = "vocabulary head" if module is head else type(module).__name__
            raise UnsupportedModelError(f"{name} ({kind}) is quantized by {method}, which this engine cannot slice")
        setattr(module, MARK, scheme)


def _mark_experts(name: str, module: Any, quantization: Quantization) -> None:
    scheme = quantization.experts_of(name, has_gate=getattr(module, "has_gate", True))
    if scheme is None:
        return
    if scheme.suffixes is None and getattr(module, "has_bias", False):
        raise UnsupportedModelError(
            f"the experts {name} have biases and are quantized by {quantization.method} one by one, which this engine "
            "does not read; use the model's mxfp4 or bfloat16 release"
        )
    setattr(module, EXPERTS_MARK, scheme)


def shift_linear(source: nn.Module, cut: Cut, sharding: Sharding, base: Place) -> ShiftLinear | QuantizedLinear:
    """The replacement of `source`: a quantized layer if its checkpoint has one."""
    scheme: Scheme | None = getattr(source, MARK, None)
    if scheme is None:
        return ShiftLinear(source, cut, sharding, base)
    assert isinstance(source, nn.Linear)
    return QuantizedLinear(source, scheme, cut, sharding, base)


def replace_whole(model: nn.Module, base: Place) -> dict[str, QuantizedLinear]:
    """Replace the quantized layers that no rule splits by ones that every rank stores in full; returns them by name."""
    replaced = {}
    for name, module in list(model.named_modules()):
        scheme: Scheme | None = getattr(module, MARK, None)
        if scheme is not None:
            assert isinstance(module, nn.Linear)
            whole = Sharding((Part(1, module.out_features, shared=True),))  # one unit, shared by all slices
            replaced[name] = QuantizedLinear(module, scheme, "column", whole, base)
            model.set_submodule(name, replaced[name])
    return replaced
