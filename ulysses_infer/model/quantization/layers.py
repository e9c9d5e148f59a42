"""Marks the quantized layers of a model before it is adapted, and creates them."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.experts import is_experts, scales_inputs
from ulysses_infer.model.layers.linear import Cut, ShiftLinear, features_of, is_linear
from ulysses_infer.model.quantization.expert_scheme import EXPERTS_MARK, ExpertScheme
from ulysses_infer.model.quantization.formats import Quantization
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.quantization.scheme import MARK, Scheme
from ulysses_infer.parallel.layout import Place
from ulysses_infer.parallel.sharding import Part, Sharding

logger = logging.getLogger(__name__)
LEAST_FEATURES = 16
"""A layer with fewer outputs or inputs is a gate or a small vector of a recurrent layer: it stays as it is."""
KEPT = frozenset(("gate", "router", "shared_expert_gate", "dt_proj", "x_proj"))
"""Names of layers that stay as they are, too: routers, and projections that set the time steps of a recurrence."""


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
        is_kept = any(part in name for part in model._keep_in_fp32_modules or ())  # dense in quantised checkpoints, too
        if is_kept or not is_linear(module) or (module is head and not quantization.head):
            continue
        scheme = quantization.scheme_of(name)
        if scheme is None:
            continue
        if module is head or not isinstance(module, nn.Linear):
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


def mark_online(model: Any, scheme: Scheme, head_scheme: Scheme | None = None) -> None:
    """Mark the linear layers and experts of an empty model that are to be quantised while loading.

    Embeddings, routers, norms and what else is not a matrix product of tokens stay dense, the vocabulary head without
    a scheme of its own too.
    """
    head = model.get_output_embeddings()
    if head_scheme is not None and isinstance(head, nn.Linear):
        setattr(head, MARK, head_scheme)
    kept = []
    for name, module in model.named_modules():
        experts = module.experts if scales_inputs(module) else module if is_experts(module) else None
        if experts is not None:
            setattr(experts, EXPERTS_MARK, _expert_scheme(experts, scheme))
        if not is_linear(module) or module is head:
            continue
        if name.rpartition(".")[2] in KEPT or min(features_of(module)) < LEAST_FEATURES:
            kept.append(name)
        else:
            setattr(module, MARK, scheme)
    if kept:
        logger.info("not quantised: %d small layers, among them %s", len(kept), kept[0])


def _expert_scheme(experts: Any, scheme: Scheme) -> ExpertScheme:
    up = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    return ExpertScheme({up: scheme, "down_proj": scheme}, suffixes={}, is_online=True)


def shift_linear(source: nn.Module, cut: Cut, sharding: Sharding, base: Place) -> ShiftLinear | QuantizedLinear:
    """The replacement of `source`: a quantized layer if its checkpoint has one."""
    scheme: Scheme | None = getattr(source, MARK, None)
    if scheme is None:
        return ShiftLinear(source, cut, sharding, base)
    return QuantizedLinear(source, scheme, cut, sharding, base)


def replace_whole(model: nn.Module, base: Place) -> dict[str, QuantizedLinear]:
    """Replace the quantized layers that no rule splits by ones that every rank stores in full; returns them by name."""
    replaced = {}
    for name, module in list(model.named_modules()):
        scheme: Scheme | None = getattr(module, MARK, None)
        if scheme is not None:
            whole = Sharding((Part(1, features_of(module)[0], shared=True),))  # one unit, shared by all slices
            replaced[name] = QuantizedLinear(module, scheme, "column", whole, base)
            model.set_submodule(name, replaced[name])
    return replaced
