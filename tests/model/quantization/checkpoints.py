"""Tiny checkpoints in the public quantised formats, and transformers' model of their weights made dense again.

Quantising and dequantising are written here independently, value by value from the formats' descriptions, on whole
matrices: nothing of the package is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.equivalence.tiny_models import make_checkpoint

Tensors = dict[str, torch.Tensor]
Quantise = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]  # a weight [out, in] -> its tensors, dense again
FP8 = torch.float8_e4m3fn


def repeated(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """[out, in] from one value per block."""
    rows, columns = torch.arange(shape[0]) // block[0], torch.arange(shape[1]) // block[1]
    return scale[rows][:, columns]


def blocks_of(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The largest absolute value of every block."""
    shape = [-(-size // step) for size, step in zip(weight.shape, block, strict=True)]
    largest = torch.zeros(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            part = weight[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
            largest[row, column] = part.abs().max()
    return largest


def fp8_block(block: tuple[int, int], name: str = "weight_scale_inv", dtype: torch.dtype = torch.float32) -> Quantise:
    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale = (blocks_of(weight, block) / 448).to(dtype)
        wide = repeated(scale.float(), weight.shape, block)
        values = (weight / wide).clamp(-448, 448).to(FP8)
        return {"weight": values, name: scale}, values.float() * wide

    return quantise


def fp8_channel(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    values = (weight / scale.float()).clamp(-448, 448).to(FP8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale.float()


def int8_channel(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def fp8_tensor(name: str, shape: tuple[int, ...]) -> Quantise:
    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale = weight.abs().max() / 448
        values = (weight / scale).clamp(-448, 448).to(FP8)
        return {"weight": values, name: scale.view(shape), "input_scale": torch.ones(1)}, values.float() * scale

    return quantise


def pack(values: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """int values [n, m] packed along the last dimension; place i of a word takes value `order[i]` of its own."""
    count = 32 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % count)).long()
    words = torch.zeros(values.shape[0], values.shape[1] // count, dtype=torch.int64)
    for place in range(count):
        value = place if order is None else order[place]
        words |= values[:, value::count] << (bits * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def affine(
    weight: torch.Tensor, groups: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unsigned values [out, in], zero points and scales [out, G] (half precision), and the dense weight."""
    count, top = int(groups.max()) + 1, (1 << bits) - 1
    scales, zeros = torch.zeros(weight.shape[0], count), torch.zeros(weight.shape[0], count)
    for group in range(count):
        part = weight[:, groups == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales[:, group] = ((high - low) / top).half().float()
        middle = torch.full_like(low, float(1 << (bits - 1)))
        zeros[:, group] = middle if symmetric else (-low / scales[:, group]).round().clamp(1, top)
    values = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, top)
    return values, zeros, scales, (values - zeros[:, groups]) * scales[:, groups]


def grouping(inputs: int, group_size: int) -> torch.Tensor:
    return torch.arange(inputs) // (group_size if group_size > 0 else inputs)


def awq(group_size: int) -> Quantise:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        values, zeros, scales, dense = affine(weight, grouping(weight.shape[1], group_size), 4, symmetric=False)
        return {
            "qweight": pack(values.t(), 4, order),
            "qzeros": pack(zeros.t(), 4, order),
            "scales": scales.t().half(),
        }, dense

    return quantise


def gptq(group_size: int, bits: int = 4, reordered: bool = False, version: int = 1) -> Quantise:
    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = grouping(weight.shape[1], group_size)
        if reordered:
            groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]
        values, zeros, scales, dense = affine(weight, groups, bits, symmetric=False)
        stored = zeros - 1 if version == 1 else zeros
        return {
            "qweight": pack(values, bits).t(),
            "qzeros": pack(stored.t(), bits),
            "scales": scales.t().half(),
            "g_idx": groups.int(),
        }, dense

    return quantise


def compressed(group_size: int, symmetric: bool, reordered: bool = False) -> Quantise:
    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = grouping(weight.shape[1], group_size)
        if reordered:
            groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]
        values, zeros, scales, dense = affine(weight, groups, 4, symmetric)
        tensors = {
            "weight_packed": pack(values, 4),
            "weight_scale": scales.half(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack(zeros.t(), 4).t()
        if reordered:
            tensors["weight_g_idx"] = groups.int()
        return tensors, dense

    return quantise


def float_zeros(group_size: int) -> Quantise:
    """The format of `model.quantize: int4`: scales and zero points in bfloat16, codes by rounding to nearest."""

    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = grouping(weight.shape[1], group_size)
        each = [weight[:, groups == group] for group in range(int(groups[-1]) + 1)]
        low, high = (torch.stack([of(part, 1).values for part in each], 1) for of in (torch.min, torch.max))
        scales = ((high - low) / 15).bfloat16()
        zeros = (-low / scales.float()).bfloat16()
        scale, zero = (part.float()[:, groups] for part in (scales, zeros))
        values = (weight / scale + zero).round().clamp(0, 15)
        tensors = {"weight_packed": pack(values.int(), 4), "weight_scale": scales, "weight_zero_point": zeros}
        return tensors, (values - zero) * scale

    return quantise


def compressed_config(layout: str, **weights: Any) -> dict[str, Any]:
    """A `quantization_config` as llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"dynamic": True, "strategy": "token"}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


@dataclass(frozen=True)
class Format:
    """A public format: what config.json says, and how a weight is stored."""

    config: dict[str, Any]
    quantise: Quantise
    spared: tuple[str, ...] = field(default=())
    """Endings of layer names that the config leaves alone."""


FORMATS: dict[str, Format] = {
    "fp8-block": Format(
        {"quant_method": "fp8", "weight_block_size": [12, 20], "activation_scheme": "dynamic"},
        fp8_block((12, 20), dtype=torch.bfloat16),
    ),
    "fp8-spared": Format(
        {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "fmt": "e4m3",
            "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn", "down_proj"],
        },
        fp8_block((128, 128)),
        ("layers.0.self_attn.*", "down_proj"),
    ),
    "fp8-tensor": Format({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor("weight_scale_inv", ())),
    "fp8-autofp8": Format({"quant_method": "fp8", "ignored_layers": ["lm_head"]}, fp8_tensor("weight_scale", (1,))),
    "modelopt": Format(
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "*.layers.1.mlp*"]},
        fp8_tensor("weight_scale", ()),
        ("layers.1.mlp.*",),
    ),
    "fbgemm": Format(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        fp8_channel,
    ),
    "compressed-channel": Format(
        compressed_config("float-quantized", num_bits=8, type="float", strategy="channel"), fp8_channel
    ),
    "compressed-block": Format(
        compressed_config("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[12, 20]),
        fp8_block((12, 20), "weight_scale"),
    ),
    "compressed-int8": Format(
        compressed_config("int-quantized", num_bits=8, type="int", strategy="channel"), int8_channel
    ),
    "compressed-int4": Format(
        compressed_config("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16),
        compressed(16, symmetric=True),
    ),
    "compressed-int4-zeros": Format(
        compressed_config("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=False),
        compressed(16, symmetric=False),
    ),
    "compressed-int4-reordered": Format(
        compressed_config("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, actorder="group"),
        compressed(16, symmetric=True, reordered=True),
    ),
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}, awq(16)),
    "awq-channel": Format({"quant_method": "awq", "bits": 4, "group_size": -1, "version": "gemm"}, awq(-1)),
    "gptq": Format({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}, gptq(16)),
    "gptq-reordered": Format(
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}, gptq(16, reordered=True)
    ),
    "gptq-8bit-v2": Format(
        {"quant_method": "gptq", "bits": 8, "group_size": 20, "checkpoint_format": "gptq_v2"},
        gptq(20, bits=8, version=2),
    ),
}


def make_quantised(config: Any, folder: Path, chosen: Format) -> Any:
    """Save a tiny random model in the format to `folder`; returns transformers' model of the dense weights, float32."""
    model = make_checkpoint(config, folder)
    tensors = load_file(folder / "model.safetensors")
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and module is not head and not is_spared(name, chosen.spared):
            stored, dense = chosen.quantise(module.weight.detach())
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in stored.items()}
            with torch.no_grad():
                module.weight.copy_(dense)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=chosen.config)
    return model


def is_spared(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a layer's name ends in one of `endings`, or lies below one that ends in `.*`."""
    return any(
        f".{ending.removesuffix('*')}" in f"{name}." if ending.endswith("*") else name.endswith(ending)
        for ending in endings
    )


def change_config(folder: Path, **changes: Any) -> None:
    """Other values in a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
