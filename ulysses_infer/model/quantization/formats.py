"""Reads `quantization_config`: the scheme of each linear layer. Unknown formats are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.quantization.expert_scheme import ExpertScheme
from ulysses_infer.model.quantization.mxfp4 import Mxfp4Weight
from ulysses_infer.model.quantization.packed import AwqWeight, CompressedWeight, GptqWeight
from ulysses_infer.model.quantization.scaled import ScaledWeight, TransposedScaledWeight
from ulysses_infer.model.quantization.scheme import Scheme
from ulysses_infer.model.quantization.selection import (
    Selection,
    either,
    everything,
    globbed,
    not_converted,
    nothing,
    targeted,
)

Keys = Callable[[], Iterable[str]]
MERGED = ("gate_up_proj", "down_proj")  # expert matrices that one tensor holds
BITS_PER_WORD = (2, 4, 8)  # widths for which a word holds a whole number of values


@dataclass(frozen=True)
class Quantization:
    """Which linear layers of a checkpoint are quantized, and how. The first group that contains a layer decides."""

    method: str
    groups: tuple[tuple[Selection, Scheme], ...]
    ignored: Selection = nothing
    head: bool = False
    """Whether the output embedding may be quantized too; most methods leave it alone without saying so."""
    merged: ExpertScheme | None = None
    """For checkpoints with one tensor for all experts of a layer; None for one tensor per expert."""

    def scheme_of(self, name: str) -> Scheme | None:
        """How the linear layer `name` is stored; None if it is not quantized."""
        if self.ignored(name):
            return None
        return next((scheme for selected, scheme in self.groups if selected(name)), None)

    def experts_of(self, name: str, has_gate: bool) -> ExpertScheme | None:
        """How the experts of the module `name` are stored; None if they are not quantized.

        Raises `UnsupportedModelError` if only some of their projections are.
        """
        if self.merged is not None:
            return None if self.ignored(name) else self.merged
        names = ("gate_proj", "up_proj", "down_proj") if has_gate else ("up_proj", "down_proj")
        found = {child: self.scheme_of(f"{name}.0.{child}") for child in names}
        schemes = {child: scheme for child, scheme in found.items() if scheme is not None}
        if schemes and len(schemes) < len(names):
            plain = next(child for child in names if child not in schemes)
            raise UnsupportedModelError(
                f"the experts {name} are quantized by {self.method}, but not their {plain}; this engine reads experts "
                "that are quantized whole or left alone"
            )
        return ExpertScheme(schemes) if schemes else None


def read_quantization(config: Any, keys: Keys) -> Quantization | None:
    """Reads a transformers config; None if nothing is quantized. `keys`: tensor names of the checkpoint.

    Raises `UnsupportedModelError` for a method, or a variant of one, that is not supported.
    """
    given = getattr(config, "quantization_config", None)
    if not given:
        return None
    values: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    named = values.get("quant_method")
    method = str(getattr(named, "value", named) or "")
    reader = READERS.get(method)
    if reader is None:
        known = ", ".join(sorted(READERS))
        raise UnsupportedModelError(
            f"the checkpoint is quantized by {method or 'a method it does not name'}; this engine reads {known}"
        )
    return reader(values, keys)


def _refuse(method: str, what: str, value: Any, known: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the checkpoint is quantized by {method} with {what} {value!r}, but this engine reads {known}"
    )


def _plain_modules(values: dict[str, Any]) -> Selection:
    return not_converted([*(values.get("modules_to_not_convert") or ()), *(values.get("ignored_layers") or ())])


def _fp8(values: dict[str, Any], keys: Keys) -> Quantization:
    """Block-scaled (DeepSeek-V3, Qwen3-FP8), or one scale per layer."""
    if values.get("fmt", "e4m3") != "e4m3":
        raise _refuse("fp8", "fmt", values["fmt"], "e4m3")
    block = values.get("weight_block_size")
    if block:
        scheme = ScaledWeight("weight_scale_inv", "block", (int(block[0]), int(block[1])))
    else:
        named = any(key.endswith(".weight_scale_inv") for key in keys())
        scheme = ScaledWeight("weight_scale_inv" if named else "weight_scale", "tensor")
    return Quantization("fp8", ((everything, scheme),), _plain_modules(values))


def _fbgemm_fp8(values: dict[str, Any], keys: Keys) -> Quantization:
    """Its experts, as in llama4, are `gate_up_proj` [E, H, 2 * I] and `down_proj` [E, I, H], each with a `*_scale`."""
    scheme, ignored = ScaledWeight("weight_scale", "channel"), _plain_modules(values)
    suffixes = {"weight": "", "weight_scale": "_scale"}
    experts = ExpertScheme(dict.fromkeys(MERGED, TransposedScaledWeight()), suffixes)
    return Quantization("fbgemm_fp8", ((everything, scheme),), ignored, merged=experts)


def _mxfp4(values: dict[str, Any], keys: Keys) -> Quantization:
    """gpt-oss; only its experts are quantized."""
    suffixes = {"blocks": "_blocks", "scales": "_scales"}
    experts = ExpertScheme(dict.fromkeys(MERGED, Mxfp4Weight()), suffixes)
    return Quantization("mxfp4", (), _plain_modules(values), merged=experts)


def _modelopt(values: dict[str, Any], keys: Keys) -> Quantization:
    algorithm = values.get("quant_algo")
    if algorithm != "FP8":
        raise _refuse("modelopt", "quant_algo", algorithm, "FP8")
    patterns = values.get("ignore") or values.get("exclude_modules") or ()
    return Quantization("modelopt", ((everything, ScaledWeight("weight_scale", "tensor")),), globbed(patterns))


def _awq(values: dict[str, Any], keys: Keys) -> Quantization:
    version = str(values.get("version", "gemm")).lower()
    if version != "gemm" or values.get("bits", 4) != 4 or not values.get("zero_point", True):
        variant = {name: values.get(name) for name in ("version", "bits", "zero_point")}
        raise _refuse("awq", "the variant", variant, "version gemm of 4 bits with zero points")
    return Quantization("awq", ((everything, AwqWeight(values.get("group_size", 128))),), _plain_modules(values))


def _gptq(values: dict[str, Any], keys: Keys) -> Quantization:
    bits, layout = values.get("bits", 4), values.get("checkpoint_format") or "gptq"
    if bits not in BITS_PER_WORD:
        raise _refuse("gptq", "bits", bits, "2, 4 and 8")
    if layout not in ("gptq", "gptq_v2"):
        raise _refuse("gptq", "checkpoint_format", layout, "gptq and gptq_v2")
    others = sorted(pattern for pattern in values.get("dynamic") or () if not pattern.startswith("-:"))
    if others:
        raise _refuse("gptq", "dynamic", others[0], "layers that are quantized alike or, by -: patterns, left alone")
    reordered, offset = bool(values.get("desc_act", False)), 1 if layout == "gptq" else 0
    scheme = GptqWeight(values.get("group_size", 128), bits, reordered, offset)
    spared = targeted([f"re:{pattern.removeprefix('-:')}" for pattern in values.get("dynamic") or ()])
    ignored = either(_plain_modules(values), spared)
    return Quantization("gptq", ((everything, scheme),), ignored, bool(values.get("lm_head", False)))


def _compressed(values: dict[str, Any], keys: Keys) -> Quantization:
    sparsity = (values.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _refuse("compressed-tensors", "sparsity", sparsity, "dense weights")
    groups = []
    for group in (values.get("config_groups") or {}).values():
        layout = group.get("format") or values.get("format") or "none"
        groups.append((targeted(group.get("targets") or ["Linear"]), _compressed_scheme(layout, group["weights"])))
    return Quantization("compressed-tensors", tuple(groups), targeted(values.get("ignore") or ()), head=True)


def _compressed_scheme(layout: str, weights: dict[str, Any]) -> Scheme:
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    strategy, symmetric = weights.get("strategy") or "tensor", weights.get("symmetric", True)
    found = f"{layout}, {bits} bits of {kind}, {strategy}{'' if symmetric else ', asymmetric'}"
    if layout == "pack-quantized" and kind == "int" and bits in BITS_PER_WORD and strategy in ("group", "channel"):
        size = weights.get("group_size") or -1
        reordered = weights.get("actorder") in ("group", True)
        return CompressedWeight(size if strategy == "group" else -1, bits, symmetric, reordered)
    dtype = {"float": torch.float8_e4m3fn, "int": torch.int8}.get(kind)
    if layout.endswith("-quantized") and layout != "pack-quantized" and bits == 8 and dtype and symmetric:
        if strategy in ("tensor", "channel"):
            return ScaledWeight("weight_scale", "tensor" if strategy == "tensor" else "channel", dtype=dtype)
        if strategy == "block":
            rows, columns = weights["block_structure"]
            return ScaledWeight("weight_scale", "block", (rows, columns), dtype)
    known = (
        "float-quantized and int-quantized symmetric weights of 8 bits by tensor, channel or block, and "
        "pack-quantized ones of 2, 4 or 8 bits by group or channel"
    )
    raise _refuse("compressed-tensors", "weights of", found, known)


READERS: dict[str, Callable[[dict[str, Any], Keys], Quantization]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
}
