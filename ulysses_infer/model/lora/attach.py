"""Attaches LoRA adapters to sharded linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ulysses_infer.errors import CheckpointError
from ulysses_infer.model.context import step_context
from ulysses_infer.model.layers.matmul import linear
from ulysses_infer.model.lora.adapter import Adapter, LoraWeights
from ulysses_infer.parallel.layout import Place, Span
from ulysses_infer.parallel.sharding import Sharding


class LinearSharding(NamedTuple):
    """How a linear layer is sharded."""

    cut: str
    sharding: Sharding
    base: Place


class LayerAdapters:
    """All adapters of one linear layer, applied to its output by a forward hook.

    A column-parallel layer shards the rows of `up` and replicates `down`. A row-parallel layer shards the columns of
    `down` and all-reduces the small intermediate result, [n, r], before `up`.
    """

    def __init__(self, slices: LinearSharding | None) -> None:
        self._linear_sharding = slices
        self._stored: dict[int, LoraWeights] = {}
        self._views: dict[int, LoraWeights] = {}

    def add(self, index: int, layer: LoraWeights) -> None:
        """Store this rank's base slice of adapter `index`."""
        if self._linear_sharding is None:
            self._stored[index] = layer
            return
        spans = self._linear_sharding.sharding.base_spans(self._linear_sharding.base)
        self._stored[index] = _select_slices(layer, self._linear_sharding.cut, spans)

    def remove(self, indices: Sequence[int]) -> None:
        """Free the weights of adapters."""
        self._stored = {index: layer for index, layer in self._stored.items() if index not in indices}

    def bind(self, place: Place) -> None:
        """Switch to the slices of `place`."""
        self._views = self._stored
        if self._linear_sharding is not None:
            spans = self._linear_sharding.sharding.local_spans(self._linear_sharding.base, place)
            cut = self._linear_sharding.cut
            self._views = {index: _select_slices(layer, cut, spans) for index, layer in self._stored.items()}

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """The forward hook. inputs: ([..., in],); output: [..., out], updated in place for rows with an adapter."""
        context = step_context()
        flat = inputs[0].flatten(0, -2)
        for index, rows in context.adapters:
            layer = self._views.get(index)
            if layer is None:
                continue
            hidden = linear(flat[rows], layer.down)
            if self._linear_sharding is not None and self._linear_sharding.cut == "row":
                hidden = context.collectives.sum_over_tp(hidden)
            added = linear(hidden, layer.up) * layer.scaling
            output.view(-1, output.shape[-1]).index_add_(0, rows, added)
        return output


def check_adapter(injection: Any, adapter: Adapter) -> None:
    """Raises `CheckpointError` if a layer does not exist, does not support adapters, or has another shape."""
    for name, layer in adapter.layers.items():
        _check(adapter.name, name, layer, _find(injection, adapter.name, name))


def attach_adapter(injection: Any, adapter: Adapter, index: int, dtype: torch.dtype, device: torch.device) -> None:
    """Attach an adapter that fits to its linear layers, with its number in step plans. The layers are to be bound."""
    for name, layer in adapter.layers.items():
        on_device = LoraWeights(layer.down.to(device, dtype), layer.up.to(device, dtype), layer.scaling)
        _adapters_of(injection, injection.model.get_submodule(name)).add(index, on_device)


def detach_adapters(injection: Any, indices: Sequence[int]) -> None:
    """Free the weights of adapters. The layers are to be bound."""
    for layer in injection.mode_aware_layers:
        if isinstance(layer, LayerAdapters):
            layer.remove(indices)


def _adapters_of(injection: Any, module: Any) -> LayerAdapters:
    """The adapters of a linear layer."""
    for hook in module._forward_hooks.values():
        if isinstance(hook, LayerAdapters):
            return hook
    made = LayerAdapters(_linear_sharding(module))
    module.register_forward_hook(made)
    injection.mode_aware_layers.append(made)
    return made


def _find(injection: Any, adapter: str, name: str) -> nn.Module:
    try:
        module: nn.Module = injection.model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"adapter {adapter!r} changes {name}, which this model does not have") from None
    if injection.is_inside_recurrent_layer(f"{name}.weight"):
        raise CheckpointError(
            f"adapter {adapter!r} changes {name}, which is inside a recurrent layer; only its projections in and out "
            "support adapters"
        )
    owner, _, leaf = name.rpartition(".")
    if leaf in getattr(injection.model.get_submodule(owner), "read_weights", ()):
        raise CheckpointError(f"adapter {adapter!r} changes {name}, whose inputs are grouped; it supports no adapters")
    if not (hasattr(module, "sharding") or type(module) is nn.Linear):
        raise CheckpointError(
            f"adapter {adapter!r} changes {name} ({type(module).__name__}); only projections of attention and "
            "feed-forward layers support adapters"
        )
    return module


def _linear_sharding(module: Any) -> LinearSharding | None:
    return LinearSharding(module.cut, module.sharding, module.base) if hasattr(module, "sharding") else None


def _check(adapter: str, name: str, layer: LoraWeights, module: Any) -> None:
    slices = _linear_sharding(module)
    if slices is None:
        fits = (layer.up.shape[0], layer.down.shape[1]) == tuple(module.weight.shape)
    else:
        features = layer.up.shape[0] if slices.cut == "column" else layer.down.shape[1]
        fits = features == slices.sharding.features
    if not fits:
        shape = [layer.up.shape[0], layer.down.shape[1]]
        raise CheckpointError(f"adapter {adapter!r} is for another model: it changes {name} as if it were {shape}")


def _select_slices(layer: LoraWeights, cut: str, spans: Sequence[Span]) -> LoraWeights:
    """`layer` with only the rows of `up` (column cut) or the columns of `down` (row cut) at `spans`."""
    if cut == "column":
        return replace(layer, up=_concat_slices(layer.up, 0, spans))
    return replace(layer, down=_concat_slices(layer.down, 1, spans))


def _concat_slices(tensor: torch.Tensor, dimension: int, spans: Sequence[Span]) -> torch.Tensor:
    parts = [tensor.narrow(dimension, span.start, span.size) for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dimension)
