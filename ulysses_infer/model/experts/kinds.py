"""Which transformers modules are experts, and how large they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ulysses_infer.model.layers.linear import features_of
from ulysses_infer.model.quantization.component import Component
from ulysses_infer.model.quantization.expert_scheme import EXPERTS_MARK, ExpertScheme
from ulysses_infer.model.quantization.scheme import MARK


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is a transformers experts module: 3-D weights behind the experts interface."""
    return all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated"))


def scales_inputs(module: nn.Module) -> bool:
    """Whether `module` is llama4's mixture block, whose experts have no such interface."""
    return type(module).__name__ == "Llama4TextMoe"


class ExpertShape(NamedTuple):
    """Sizes of a layer's experts."""

    num_experts: int
    hidden_size: int
    width: int


def expert_shape(module: Any) -> ExpertShape:
    """Sizes of a module that still has its whole weights, llama4's too."""
    num_experts, *sizes = module.down_proj.shape
    hidden_size, width = reversed(sizes) if getattr(module, "is_transposed", True) else sizes
    return ExpertShape(num_experts, hidden_size, width)


class ExpertSizes(NamedTuple):
    """The share of a model that is experts."""

    expert_bytes: int
    other_bytes: int
    num_experts: int
    """0: the model has no experts."""


def expert_sizes(model: nn.Module) -> ExpertSizes:
    """For transformers' module tree before injection; layers marked as quantized count as stored."""
    found: list[Any] = [module for module in model.modules() if is_experts(module)]
    found += [module.experts for module in model.modules() if scales_inputs(module)]
    experts = sum(_num_bytes(module) for module in found)
    num_experts = expert_shape(found[0]).num_experts if found else 0
    return ExpertSizes(experts, _num_bytes(model) - experts, num_experts)


def matrix_sizes(name: str, shape: ExpertShape) -> tuple[int, int]:
    """(outputs, inputs) of one expert's `gate_proj`, `up_proj`, `gate_up_proj` or `down_proj`."""
    if name == "down_proj":
        return shape.hidden_size, shape.width
    return (2 if name == "gate_up_proj" else 1) * shape.width, shape.hidden_size


def dense_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D weights of an experts module, without its biases."""
    return {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}


def _num_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, tied ones counted once."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(map(_size, model.parameters())) + sum(_change(module, embeddings) for module in model.modules())


def _change(module: Any, embeddings: set[int]) -> int:
    """Bytes that quantized storage of a layer takes more (or, if negative, less) than its dense weights.

    embeddings: identities of weights that stay dense, also if a head is tied to them.
    """
    if hasattr(module, MARK):
        components = getattr(module, MARK).components(*features_of(module))
        return _total(components) - (0 if id(module.weight) in embeddings else _size(module.weight))
    if hasattr(module, EXPERTS_MARK):
        scheme: ExpertScheme = getattr(module, EXPERTS_MARK)
        shape = expert_shape(module)
        one = sum(_total(s.components(*matrix_sizes(name, shape))) for name, s in scheme.schemes.items())
        return shape.num_experts * one - sum(map(_size, dense_weights(module).values()))
    return 0


def _total(components: Mapping[str, Component]) -> int:
    return sum(component.num_bytes for component in components.values())


def _size(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()
