"""Finds the recurrent layers of a model, by the names of their parts."""

from __future__ import annotations

from torch import nn

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.recurrent.delta import (
    delta_net,
    interleaved_delta_net,
    kimi_delta_attention,
    separate_delta_net,
)
from ulysses_infer.model.recurrent.kinds.convolution import short_convolution
from ulysses_infer.model.recurrent.kinds.griffin import recurrent_block
from ulysses_infer.model.recurrent.kinds.mlstm import matrix_memory
from ulysses_infer.model.recurrent.kinds.rwkv import time_mixing
from ulysses_infer.model.recurrent.layer import RecurrentLayer
from ulysses_infer.model.recurrent.lightning import lightning_attention
from ulysses_infer.model.recurrent.mamba import mamba, mamba2, zamba
from ulysses_infer.model.recurrent.ngram import NGramLayer
from ulysses_infer.model.recurrent.rules import Owner, Rule, RuleMaker
from ulysses_infer.parallel.layout import Layout, Place

_KIMI = ("q_proj", "k_proj", "v_proj", "conv1d", "forget_gate", "b_proj", "o_norm", "o_proj")

_MAMBA = ("conv1d", "in_proj", "x_proj", "dt_proj", "out_proj")

RULES: dict[frozenset[str], RuleMaker] = {
    frozenset(parts): maker
    for maker, parts in (
        (interleaved_delta_net, ("conv1d", "in_proj_qkvz", "in_proj_ba", "norm", "out_proj")),
        (delta_net, ("conv1d", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "norm", "out_proj")),
        (
            separate_delta_net,
            ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_proj", "conv1d", "o_norm"),
        ),
        (kimi_delta_attention, (*_KIMI, "g_a_proj", "g_b_proj")),
        (kimi_delta_attention, (*_KIMI, "g_proj")),
        (lightning_attention, ("norm", "qkv_proj", "out_proj", "output_gate")),
        (short_convolution, ("conv", "in_proj", "out_proj")),
        (mamba2, ("conv1d", "in_proj", "norm", "out_proj")),
        (mamba2, ("conv1d", "in_proj", "out_proj")),
        (recurrent_block, ("linear_x", "linear_y", "linear_out", "conv_1d", "rg_lru")),
        (zamba, ("conv1d", "in_proj", "out_proj", "x_proj_weight")),
        (time_mixing, ("key", "value", "receptance", "output")),
        (matrix_memory, ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact", "multihead_norm", "out_proj")),
        (matrix_memory, ("qkv_opreact", "ifgate_preact", "multihead_norm", "out_proj")),
        (mamba, _MAMBA),
        (mamba, (*_MAMBA, "dt_layernorm", "b_layernorm", "c_layernorm")),
    )
}
"""By the names of all parts with weights, and those of distinctive weights."""
DISTINCTIVE = ("x_proj_weight",)
NGRAMS = frozenset(("ple_embedding", "key_proj", "value_proj", "norm_key", "norm_query", "norm_conv", "conv1d"))


def inject_recurrent(decoder: nn.Module, prefix: str, layout: Layout, base: Place) -> list[RecurrentLayer | NGramLayer]:
    """Shard all recurrent layers of `decoder`, whose name in the model is `prefix`."""
    owner, found = Owner(base.shard, layout.world_size), list[RecurrentLayer | NGramLayer]()
    for name, module in list(decoder.named_modules()):
        parts, full_name = _parts(module) if hasattr(module, "layer_idx") else None, f"{prefix}.{name}".lstrip(".")
        maker = None if parts is None else RULES.get(parts)
        if parts == NGRAMS:
            found.append(NGramLayer(full_name, module, owner, base))
        elif maker is not None:
            found.append(RecurrentLayer(full_name, module, _made(maker, module, full_name), owner, base))
    return found


def _parts(module: nn.Module) -> frozenset[str]:
    parts = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    return frozenset(parts | {name for name in DISTINCTIVE if hasattr(module, name)})


def _made(maker: RuleMaker, module: nn.Module, name: str) -> Rule:
    try:
        return maker(module)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) has no {error.name}, unlike layers that look like it"
        ) from error
