"""Weights of a model in training: ZeRO-partitioned, or with PEFT's LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ulysses_infer.errors import ConfigError
from ulysses_infer.model.loading.files import take
from ulysses_infer.parallel.layout import Span


@contextmanager
def gathered(parameters: list[torch.Tensor]) -> Iterator[None]:
    """Gather parameters partitioned by ZeRO 3 within the context. Collective if any is partitioned."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(parameters):
        yield


class TrainingSource:
    """The weights of a module that DeepSpeed trains, ZeRO 0 to 3.

    What is read is a copy, because the optimizer changes the original. With ZeRO 3 each read gathers one parameter
    from all ranks and then releases it, so all ranks must read the same names in the same order.
    """

    def __init__(self, module: Any) -> None:
        saved = module.state_dict().keys()
        self._tensors: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
        self._tensors |= {name: buffer for name, buffer in module.named_buffers() if name in saved}

    def keys(self) -> Iterable[str]:
        """Names of parameters and saved buffers."""
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the whole tensor; nothing is gathered."""
        tensor = self._tensors[key]
        return tuple(getattr(tensor, "ds_shape", tensor.shape))

    def read(self, key: str, kept: tuple[int, list[Span]] | None) -> torch.Tensor:
        """A copy of the tensor, or of the spans of one dimension, joined. Collective with ZeRO 3."""
        tensor = self._tensors[key]
        with gathered([tensor]):
            return take(tensor.detach(), kept).clone()


def has_adapters(module: Any) -> bool:
    """Whether PEFT has put adapters, or copies of layers to be trained, into the module."""
    return any(hasattr(part, "adapter_layer_names") for part in module.modules())


class AdaptedSource(TrainingSource):
    """The weights of a module with LoRA adapters, merged into the base weights: W + s B A.

    The active adapters are added to a copy, one weight at a time; the module stays as it is. Layers of
    `modules_to_save` stand for those that they replace. Raises `ConfigError` for adapters of other kinds.
    """

    def __init__(self, module: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        super().__init__(module)
        self._adapted: dict[str, Any] = {}
        wrappers = {
            name: part
            for name, part in module.named_modules()
            if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)
        }
        inside = tuple(f"{name}." for name in wrappers)
        self._tensors = {name: tensor for name, tensor in self._tensors.items() if not name.startswith(inside)}
        for name, part in wrappers.items():
            self._tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in self._plain(name, part)}

    def read(self, key: str, kept: tuple[int, list[Span]] | None) -> torch.Tensor:
        """A copy of the tensor, adapters added, or of the spans of one dimension, joined. Collective with ZeRO 3."""
        layer = self._adapted.get(key)
        if layer is None:
            return super().read(key, kept)
        weight = self._tensors[key]
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        factors = [factor.weight for name in active for factor in (layer.lora_A[name], layer.lora_B[name])]
        with torch.no_grad(), gathered([weight, *factors]):
            merged = sum((layer.get_delta_weight(name).to(weight.dtype) for name in active), start=weight)
            return take(merged, kept).clone()

    def _plain(self, name: str, part: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the layer that `part` stands for, by their names in it."""
        from peft.tuners.lora import Linear
        from peft.utils.other import ModulesToSaveWrapper

        if isinstance(part, ModulesToSaveWrapper):
            replaced = not part.disable_adapters and part.active_adapters
            stands = part.modules_to_save[part.active_adapters[0]] if replaced else part.original_module
            yield from stands.named_parameters()
            return
        kind = next(iter(getattr(part, "lora_variant", {}).values()), part)  # DoRA and its like
        biased = any(getattr(part, "lora_bias", {}).values())
        if type(part) is not Linear or kind is not part or biased:
            what = "an adapter with a bias" if biased else type(kind).__name__
            raise ConfigError(f"{name} is trained with {what}; only LoRA on linear layers can be merged for serving")
        if not (part.merged or part.disable_adapters):
            self._adapted[f"{name}.weight"] = part
        yield from part.base_layer.named_parameters()
