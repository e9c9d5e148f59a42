"""The rule of xLSTM's matrix memory (Beck et al. 2024, arXiv 2405.04517)."""

from __future__ import annotations

from typing import Any

import torch

from ulysses_infer.cache.states import RECURRENT
from ulysses_infer.model.recurrent.rules import Input, OwnWeight, Rule
from ulysses_infer.parallel.sharding import Part, Sharding

STATES = 3  # memory, normaliser and maximum


def matrix_memory(module: Any) -> Rule:
    """Query, key, value, output gate, input gate and forget gate per head, packed in two projections or not."""
    heads = module.config.num_heads
    query, value = (Part(heads, width // heads) for width in (module.qk_dim, module.v_dim))
    gate = Part(heads)
    if module.config.weight_mode == "fused":
        inputs = {"qkv_opreact": (query, query, value, value), "ifgate_preact": (gate, gate)}
    else:
        inputs = {"q": (query,), "k": (query,), "v": (value,), "ogate_preact": (value,)}
        inputs |= {"igate_preact": (gate,), "fgate_preact": (gate,)}
    own = Sharding((value,))
    return Rule(
        inputs=tuple(Input(name, Sharding(parts)) for name, parts in inputs.items()),
        output="out_proj",
        output_part=value,
        weights=(OwnWeight("multihead_norm.weight", own), OwnWeight("multihead_norm.bias", own)),
        counts={
            "qk_dim": (query,),
            "v_dim": (value,),
            "multihead_norm.num_heads": (gate,),
            "multihead_norm.num_features": (value,),
        },
        units={"heads": (heads, False)},
        forward=matrix_memory_forward,
        returns_pair=True,
    )


def matrix_memory_forward(view: Any, hidden_states: torch.Tensor, past_key_values: Any) -> torch.Tensor:
    """Instead of transformers' forward, whose states are its arguments. Returns [n, L, own heads * dv]."""
    heads, limit = view.multihead_norm.num_heads, view.config.gate_soft_cap
    if view.config.weight_mode == "fused":
        sizes = (view.qk_dim, view.qk_dim, view.v_dim, view.v_dim)
        query, key, value, output_gate = view.qkv_opreact(hidden_states).split(sizes, dim=-1)
        gates = view.ifgate_preact(hidden_states).split((heads, heads), dim=-1)
    else:
        query, key, value = view.q(hidden_states), view.k(hidden_states), view.v(hidden_states)
        output_gate = view.ogate_preact(hidden_states)
        gates = view.igate_preact(hidden_states), view.fgate_preact(hidden_states)
    query, key, value = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
    entry, forget = ((limit * torch.tanh(gate / limit) if limit else gate).transpose(1, 2) for gate in gates)
    memory, normaliser, most = (past_key_values.state(RECURRENT, which) for which in range(STATES))
    output, states = view.mlstm_backend(query, key, value, entry, forget, memory, normaliser, most, mode="inference")
    for which, state in enumerate(states):
        past_key_values.set(RECURRENT, state, which)
    gated: torch.Tensor = view.ogate_act_fn(output_gate) * view.multihead_norm(output.transpose(1, 2))
    return gated
