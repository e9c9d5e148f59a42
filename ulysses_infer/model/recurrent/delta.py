"""Rules of layers with a delta rule: gated delta nets and Kimi delta attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ulysses_infer.model.recurrent.native.delta import DeltaLayer, DeltaParts, NativeDeltaNet
from ulysses_infer.model.recurrent.native.form import FedPart
from ulysses_infer.model.recurrent.rules import Input, OwnWeight, Rule, convolution
from ulysses_infer.parallel.grouped_sharding import GroupedSharding
from ulysses_infer.parallel.sharding import Part, Sharding


def interleaved_delta_net(module: Any) -> Rule:
    """Qwen3-Next: q, k, v and z of one key head are neighbours, as are b and a."""
    keys, values = module.num_k_heads, module.num_v_heads
    each = values // keys
    key, value, head = Part(1, module.head_k_dim, shared=True), Part(each, module.head_v_dim), Part(each)
    inputs = (
        Input("in_proj_qkvz", GroupedSharding((key, key, value, value), keys)),
        Input("in_proj_ba", GroupedSharding((head, head), keys)),
    )
    return _delta_net(module, inputs, "out_proj", _interleaved_parts)


def _interleaved_parts(module: Any) -> DeltaParts:
    each, key, value = module.num_v_heads // module.num_k_heads, module.head_k_dim, module.head_v_dim
    group = 2 * (key + each * value)
    return DeltaParts(
        q=FedPart(0, 0, group),
        k=FedPart(0, key, group),
        v=FedPart(0, 2 * key, group, value),
        z=FedPart(0, 2 * key + each * value, group, value),
        b=FedPart(1, 0, 2 * each, 1),
        a=FedPart(1, each, 2 * each, 1),
    )


def delta_net(module: Any) -> Rule:
    """Qwen3.5: q, k and v one after another."""
    key, value = _heads(module)
    head = Sharding((Part(value.units),))
    inputs = (
        Input("in_proj_qkv", Sharding((key, key, value))),
        Input("in_proj_z", Sharding((value,))),
        Input("in_proj_b", head),
        Input("in_proj_a", head),
    )
    return _delta_net(module, inputs, "out_proj", _consecutive_parts)


def _consecutive_parts(module: Any) -> DeltaParts:
    each, key, value = module.num_v_heads // module.num_k_heads, module.head_k_dim, module.head_v_dim
    keys = module.num_k_heads * key
    return DeltaParts(
        q=FedPart(0, 0, key),
        k=FedPart(0, keys, key),
        v=FedPart(0, 2 * keys, each * value, value),
        z=FedPart(1, 0, each * value, value),
        b=FedPart(2, 0, each, 1),
        a=FedPart(3, 0, each, 1),
    )


def separate_delta_net(module: Any) -> Rule:
    """OLMo hybrid: one projection each."""
    key, value = _heads(module)
    head = Part(value.units)
    parts = {"q_proj": key, "k_proj": key, "v_proj": value, "a_proj": head, "b_proj": head, "g_proj": value}
    inputs = tuple(Input(name, Sharding((part,))) for name, part in parts.items())
    return _delta_net(module, inputs, "o_proj", _separate_parts)


def _separate_parts(module: Any) -> DeltaParts:
    each, key, value = module.num_v_heads // module.num_k_heads, module.head_k_dim, module.head_v_dim
    return DeltaParts(
        q=FedPart(0, 0, key),
        k=FedPart(1, 0, key),
        v=FedPart(2, 0, each * value, value),
        z=FedPart(5, 0, each * value, value),
        b=FedPart(4, 0, each, 1),
        a=FedPart(3, 0, each, 1),
    )


def _heads(module: Any) -> tuple[Part, Part]:
    """The features of all keys and of all values."""
    return Part(module.num_k_heads, module.head_k_dim, shared=True), Part(module.num_v_heads, module.head_v_dim)


def _delta_net(module: Any, inputs: tuple[Input, ...], output: str, parts: Callable[[Any], DeltaParts]) -> Rule:
    """parts: where the inputs' parts lie, for the native form."""
    key, value = _heads(module)
    mixed, head = Sharding((key, key, value)), Sharding((Part(value.units),))
    return Rule(
        inputs=inputs,
        output=output,
        output_part=value,
        weights=(*convolution("conv1d", mixed), OwnWeight("A_log", head), OwnWeight("dt_bias", head)),
        counts={
            "num_k_heads": (Part(key.units, shared=True),),
            "num_v_heads": (Part(value.units),),
            "key_dim": (key,),
            "value_dim": (value,),
            "conv_dim": (key, key, value),
        },
        units={"key heads": (key.units, True), "value heads": (value.units, False)},
        native=lambda own, dtype, _: NativeDeltaNet.of(own, functools.partial(_described, parts), dtype),
    )


def _described(parts: Callable[[Any], DeltaParts], module: Any) -> DeltaLayer:
    """module: with the rank's heads."""
    norm = module.norm if hasattr(module, "norm") else module.o_norm
    return DeltaLayer(
        parts(module),
        module.num_k_heads,
        module.num_v_heads,
        module.head_k_dim,
        module.head_v_dim,
        module.conv1d,
        module.A_log,
        module.dt_bias,
        norm.weight,
        norm.variance_epsilon,
        strength=2.0 if getattr(module, "allow_neg_eigval", False) else 1.0,
    )


def kimi_delta_attention(module: Any) -> Rule:
    """Kimi Linear, GLM-5-Next: gates through a bottleneck; Ling: without."""
    heads = Part(module.num_heads, module.head_dim)
    each, whole = Sharding((Part(module.num_heads),)), Sharding((heads,))
    gate = module.forget_gate
    forget = Input("forget_gate.f_b_proj", whole, "forget_gate.f_a_proj")
    output_gate = Input("g_b_proj", whole, "g_a_proj")
    inputs = (
        *(Input(name, whole) for name in ("q_proj", "k_proj", "v_proj")),
        forget if hasattr(gate, "f_b_proj") else Input("forget_gate.f_proj", whole),
        Input("b_proj", each),
        output_gate if hasattr(module, "g_b_proj") else Input("g_proj", whole),
    )
    return Rule(
        inputs=inputs,
        output="o_proj",
        output_part=heads,
        weights=(
            *convolution("conv1d", Sharding((heads, heads, heads))),
            OwnWeight("forget_gate.A_log", each, gate.A_log.shape.index(module.num_heads)),
            OwnWeight("forget_gate.dt_bias", whole),
        ),
        counts={
            **dict.fromkeys(("num_heads", "forget_gate.num_heads"), (Part(module.num_heads),)),
            **dict.fromkeys(("qkv_dim", "forget_gate.qkv_dim"), (heads,)),
            "conv_dim": (heads, heads, heads),
        },
        units={"heads": (module.num_heads, False)},
        native=lambda own, dtype, _: NativeDeltaNet.of(own, _described_kimi, dtype),
    )


def _described_kimi(module: Any) -> DeltaLayer:
    """module: with the rank's heads."""
    heads, width, gate = module.num_heads, module.head_dim, module.forget_gate
    q, k, v, a = (FedPart(number, 0, width) for number in range(4))
    bound = getattr(gate, "safe_gate_lower_bound", None)
    if getattr(gate, "safe_gate", False):
        bound = gate.lower_bound
    return DeltaLayer(
        DeltaParts(q, k, v, z=FedPart(5, 0, width), b=FedPart(4, 0, 1), a=a),
        heads,
        heads,
        width,
        width,
        module.conv1d,
        gate.A_log,
        gate.dt_bias,
        module.o_norm.weight,
        module.o_norm.variance_epsilon,
        is_per_channel=True,
        rounds_decays=hasattr(gate, "f_proj"),
        lower_bound=bound or 0.0,
    )
