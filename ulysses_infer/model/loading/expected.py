"""The tensors that a checkpoint has by its config.json: names and shapes, without values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from ulysses_infer.config import ModelConfig
from ulysses_infer.model.experts.kinds import dense_weights, expert_shape, matrix_sizes
from ulysses_infer.model.loading.files import take
from ulysses_infer.model.loading.hf_overrides import overridden
from ulysses_infer.model.loading.multimodal import drop_multimodal_encoders
from ulysses_infer.model.model import build_empty_model, choose_dtype
from ulysses_infer.model.quantization.component import Component
from ulysses_infer.model.quantization.expert_scheme import EXPERTS_MARK, ExpertScheme
from ulysses_infer.model.quantization.formats import read_quantization
from ulysses_infer.model.quantization.layers import mark_quantised
from ulysses_infer.model.quantization.scheme import MARK
from ulysses_infer.parallel.layout import Span

Tensors = dict[str, torch.Tensor]


class ExpectedTensors:
    """A `TensorSource` on device `meta`, for a load that reads no file."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    @classmethod
    def of(cls, config: Any, settings: ModelConfig) -> ExpectedTensors:
        """What a checkpoint of the transformers config `config` has, without multimodal encoders."""
        config = overridden(config, settings.hf_overrides)
        model = build_empty_model(config, choose_dtype(settings.dtype, config), settings.trust_remote_code)
        drop_multimodal_encoders(model)
        quantization = read_quantization(config, lambda: ())
        if quantization is not None:
            mark_quantised(model, quantization)
        return cls(_stored(model))

    def keys(self) -> Iterable[str]:
        """Names as a checkpoint has them."""
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return tuple(self._tensors[key].shape)

    def read(self, key: str, kept: tuple[int, list[Span]] | None) -> torch.Tensor:
        """The tensor, or the spans of one dimension, joined; without values."""
        return take(self._tensors[key], kept)


def _stored(model: Any) -> Tensors:
    """transformers' names reverted to those of checkpoints; quantized weights under the names that are looked for."""
    dense: Tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    for name in getattr(model, "all_tied_weights_keys", {}):  # stored once
        dense.pop(name, None)
    quantised: Tensors = {}
    for name, module in model.named_modules():
        if hasattr(module, MARK):
            del dense[f"{name}.weight"]
            components = getattr(module, MARK).components(module.out_features, module.in_features)
            quantised |= {f"{name}.{leaf}": _empty(component) for leaf, component in components.items()}
        elif hasattr(module, EXPERTS_MARK):
            for weight in dense_weights(module):
                del dense[f"{name}.{weight}"]
            quantised |= _quantised_experts(name, module)
    return {**revert_weight_conversion(model, dense), **quantised}


def _quantised_experts(name: str, module: Any) -> Tensors:
    scheme: ExpertScheme = getattr(module, EXPERTS_MARK)
    shape, found = expert_shape(module), Tensors()
    for matrix, of_matrix in scheme.schemes.items():
        for leaf, component in of_matrix.components(*matrix_sizes(matrix, shape)).items():
            if scheme.suffixes is not None:
                found[f"{name}.{matrix}{scheme.suffixes[leaf]}"] = _empty(component.stacked(shape.num_experts))
                continue
            one = _empty(component)
            found |= {f"{name}.{expert}.{matrix}.{leaf}": one for expert in range(shape.num_experts)}
    return found


def _empty(component: Component) -> torch.Tensor:
    return torch.empty(component.shape, dtype=component.dtype, device="meta")
