"""Tiny mixtures of experts in the public quantised formats, and transformers' model of their weights made dense.

As in `checkpoints.py`, what is stored and what it means is written here by itself, from the formats' descriptions.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import make_checkpoint
from tests.model.quantization.checkpoints import FORMATS, FP8, Format, Quantise, Tensors, change_config

FILE = "model.safetensors"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """[out, in]: 32 values share a power of two; the nearest of sixteen values each, two to a byte."""
    groups = weight.unflatten(1, (-1, 32))
    exponents = (groups.abs().amax(2, keepdim=True) / 6).clamp(min=1e-30).log2().ceil()
    scaled = groups / 2.0**exponents
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    codes = (scaled[..., None] - values).abs().argmin(-1)
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    stored = {"_blocks": blocks.to(torch.uint8), "_scales": (exponents[..., 0] + 127).to(torch.uint8)}
    return stored, (values[codes] * 2.0**exponents).flatten(1)


def fbgemm(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """[out, in], stored transposed with one scale per output."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    values = (weight / scale).clamp(-448, 448).to(FP8)
    return {"": values.t(), "_scale": scale.t()}, values.float() * scale


@dataclass(frozen=True)
class Mixture:
    """A family's checkpoint in a format: how its experts are stored, and config values unlike other tests'."""

    family: str
    format: Format
    merged: Quantise | None = None
    """Of tensors that hold all experts."""
    changes: dict[str, Any] = field(default_factory=dict)


# 44 neurons per expert: a half or a quarter of them ends inside every block, group and word of the formats.
NARROW = {"moe_intermediate_size": 44}
MXFP4 = Format(
    {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
    mxfp4,
)
MIXTURES = {
    "qwen3-fp8": Mixture("qwen3_moe", FORMATS["fp8-block"], changes=NARROW),
    "deepseek-fp8": Mixture("deepseek_v3", FORMATS["fp8-block"], changes={**NARROW, "tie_word_embeddings": False}),
    "mixtral-fp8": Mixture("mixtral", FORMATS["fp8-autofp8"], changes={"intermediate_size": 44}),
    "qwen3-modelopt": Mixture(
        "qwen3_moe",
        Format({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, FORMATS["modelopt"].quantise),
    ),
    "llama4-compressed": Mixture("llama4_text", FORMATS["compressed-channel"]),
    "llama4-fbgemm": Mixture("llama4_text", FORMATS["fbgemm"], fbgemm, {"intermediate_size": 44}),
    "qwen3-int8": Mixture("qwen3_moe", FORMATS["compressed-int8"], changes=NARROW),
    "qwen3-int4": Mixture("qwen3_moe", FORMATS["compressed-int4-zeros"], changes=NARROW),
    "qwen3-awq": Mixture("qwen3_moe", FORMATS["awq"], changes={"moe_intermediate_size": 40}),
    "qwen3-gptq": Mixture("qwen3_moe", FORMATS["gptq"], changes=NARROW),
    "mixtral-gptq-reordered": Mixture("mixtral", FORMATS["gptq-reordered"], changes={"intermediate_size": 44}),
    "gpt-oss-mxfp4": Mixture("gpt_oss", MXFP4, mxfp4, {"intermediate_size": 96}),
}


def make_mixture(folder: Path, mixture: Mixture, **changes: Any) -> Any:
    """Save it to `folder`; returns transformers' model of the dense weights, float32, read from beside it."""
    from transformers import AutoModelForCausalLM

    model = make_checkpoint(tiny_config(mixture.family, **{**mixture.changes, **changes}), folder)
    tensors = load_file(folder / FILE)
    stored, dense = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    linears = set() if mixture.format is MXFP4 else _linears(model)
    for key, tensor in (tensors if mixture.merged else apart(tensors)).items():
        stem, _, leaf = key.rpartition(".")
        if leaf == "weight" and (stem in linears or re.search(r"experts\.\d+\.\w+$", stem)):
            found, dense[key] = mixture.format.quantise(tensor)
            stored |= {f"{stem}.{name}": part.contiguous() for name, part in found.items()}
        elif mixture.merged is not None and tensor.dim() == 3:
            found, dense[key] = _stacked(tensor, mixture.merged)
            stored |= {f"{key}{suffix}": part for suffix, part in found.items()}
        else:
            stored[key] = dense[key] = tensor
    plain = folder / "dense"
    plain.mkdir()
    shutil.copy(folder / "config.json", plain)
    save_file(_together(dense, tensors), plain / FILE, metadata={"format": "pt"})
    save_file(stored, folder / FILE, metadata={"format": "pt"})
    change_config(folder, quantization_config=mixture.format.config)
    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()


def _linears(model: Any) -> set[str]:
    head = model.get_output_embeddings()
    return {name for name, module in model.named_modules() if type(module) is torch.nn.Linear and module is not head}


def _stacked(tensor: torch.Tensor, quantise: Quantise) -> tuple[Tensors, torch.Tensor]:
    """tensor: [E, in, out]; the components of all experts, and the dense weight."""
    experts = [quantise(one.t()) for one in tensor]
    names = experts[0][0]
    components = {name: torch.stack([found[name] for found, _ in experts]).contiguous() for name in names}
    return components, torch.stack([dense.t() for _, dense in experts]).contiguous()


def apart(tensors: Tensors) -> Tensors:
    """llama4's experts one by one, [out, in], as compressed-tensors has them."""
    found = {}
    for key, tensor in tensors.items():
        if tensor.dim() != 3 or ".experts." not in key:
            found[key] = tensor
            continue
        stem, _, leaf = key.rpartition(".")
        for expert, matrix in enumerate(tensor):
            names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            for name, part in zip(names, matrix.t().chunk(len(names)), strict=True):
                found[f"{stem}.{expert}.{name}.weight"] = part.contiguous()
    return found


def _together(dense: Tensors, like: Tensors) -> Tensors:
    """The opposite of `apart`."""
    joined = {key: tensor for key, tensor in dense.items() if key in like}
    for key in like.keys() - joined.keys():
        stem, _, leaf = key.rpartition(".")
        names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        experts = range(len(like[key]))
        parts = [torch.cat([dense[f"{stem}.{expert}.{name}.weight"] for name in names]).t() for expert in experts]
        joined[key] = torch.stack(parts).contiguous()
    return joined
