"""Reads and checks the stored tensors of quantized layers."""

from __future__ import annotations

import torch

from ulysses_infer.errors import CheckpointError
from ulysses_infer.model.loading.files import TensorSource
from ulysses_infer.model.quantization.component import Component
from ulysses_infer.parallel.layout import Span

NEED_A_SCALE = (torch.float8_e4m3fn, torch.int8)
EXACT = (*NEED_A_SCALE, torch.int32, torch.uint8)  # dtypes that cannot simply be cast


def read_part(
    component: Component, source: TensorSource, key: str, kept: tuple[int, list[Span]] | None, shape: tuple[int, ...]
) -> torch.Tensor:
    """The part of `component` that a rank stores, called `key` in `source`, in `shape`. Raises `CheckpointError`.

    Dimensions of size 1 are ignored, unless they are sharded.
    """
    found = source.shape(key)
    is_alike = [n for n in found if n > 1] == [n for n in component.shape if n > 1]
    is_whole = kept is None or (kept[0] == 0 and found[:1] == component.shape[:1])
    if found != component.shape and not (is_alike and is_whole):
        raise CheckpointError(
            f"tensor {key} has shape {list(found)}, but the model's config and its quantization_config make it "
            f"{list(component.shape)}; the weights do not belong to this config.json"
        )
    tensor = source.read(key, kept)
    cast_is_wrong = component.dtype in EXACT or tensor.dtype in EXACT
    if cast_is_wrong and tensor.dtype != component.dtype and not tensor.is_meta:
        raise CheckpointError(
            f"tensor {key} is stored as {_plain(tensor.dtype)}, but quantization_config makes it "
            f"{_plain(component.dtype)}; the weights do not belong to this config.json"
        )
    return tensor.reshape(shape)


def check_foreign(key: str, source: TensorSource, known: str) -> None:
    """Check a checkpoint tensor that a layer with the tensors `known` does not use, for example zero points.

    Raises `CheckpointError` unless it is all zeros.
    """
    tensor = source.read(key, None)
    if not tensor.is_meta and bool((tensor != 0).any()):
        raise CheckpointError(f"the checkpoint has {key}, but its quantization_config makes the layer of {known}")


def check_plain(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, read for a layer that is not quantized. Raises `CheckpointError` if it needs a scale."""
    if tensor.dtype in NEED_A_SCALE:
        raise CheckpointError(
            f"tensor {key} is stored as {_plain(tensor.dtype)}, but the checkpoint's quantization_config does not "
            "name its layer, or this engine cannot read it quantized"
        )
    return tensor


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
