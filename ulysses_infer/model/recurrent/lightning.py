"""The rule of lightning attention (MiniMax), and its forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ulysses_infer.cache.states import RECURRENT
from ulysses_infer.model.recurrent.native.lightning import NativeLightning
from ulysses_infer.model.recurrent.rules import Input, Owner, OwnWeight, Rule
from ulysses_infer.model.recurrent.spread import SpreadNorm, check_spread
from ulysses_infer.parallel.sharding import Part, Sharding


def lightning_attention(module: Any) -> Rule:
    """q, k and v per head; a norm over all heads."""
    heads, width = module.num_attention_heads, module.head_dim
    each, features = Sharding((Part(heads),)), Part(heads, width)
    check_spread(module.norm)
    epsilon = module.norm.variance_epsilon
    return Rule(
        inputs=(
            Input("qkv_proj", Sharding((Part(heads, 3 * width),))),
            Input("output_gate", Sharding((features,))),
        ),
        output="out_proj",
        output_part=features,
        weights=(
            OwnWeight("norm.weight", Sharding((features,))),
            OwnWeight("slope_rate", each),
        ),
        counts={"num_attention_heads": (Part(heads),)},
        units={"heads": (heads, False)},
        replaced=_spread_norm,
        forward=lightning_forward,
        native=lambda own, dtype, owner: NativeLightning.of(own, dtype, owner, epsilon),
        returns_pair=True,
    )


def _spread_norm(module: Any, owner: Owner) -> Mapping[str, Any]:
    return {"norm": SpreadNorm(module.norm, 1, owner)} if owner.world_size > 1 else {}


def lightning_forward(view: Any, hidden_states: torch.Tensor, past_key_values: Any) -> torch.Tensor:
    """Instead of transformers' forward, which goes token by token as soon as there is a state.

    hidden_states: [n, L, ...]; returns [n, L, own heads * d].
    """
    mixed = view.act_fn(view.qkv_proj(hidden_states)).unflatten(-1, (view.num_attention_heads, -1)).transpose(1, 2)
    state = past_key_values.state(RECURRENT)
    if state is None:
        state = mixed.new_zeros((*mixed.shape[:2], view.head_dim, view.head_dim), dtype=torch.float32)
    outputs, slopes = [], view.slope_rate.float()
    for block in mixed.split(view.block_size, dim=2):
        query, key, value = (each.to(state.dtype) for each in block.split(view.head_dim, dim=-1))
        output, state = _block(slopes, query, key, value, state)
        outputs.append(output)
    past_key_values.set(RECURRENT, state)
    joined = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2).to(hidden_states.dtype)
    gated: torch.Tensor = torch.sigmoid(view.output_gate(hidden_states)) * view.norm(joined)
    return gated


def _block(
    slopes: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """slopes: [H, 1, 1]; query, key, value: [n, H, L, d], at most a block; state: [n, H, d, d]; all float32.

    Returns the output and the new state. Decays are exact, where transformers rounds them to the model's dtype.
    """
    length = query.shape[2]
    steps = torch.arange(1, length + 1, device=query.device)[:, None]
    since = steps - steps.transpose(0, 1)
    weights = (query @ key.transpose(-1, -2)) * torch.exp(-slopes * since.clamp(min=0)) * (since >= 0)
    before = (query * torch.exp(-slopes * steps)) @ state
    decayed = key * torch.exp(-slopes * (length - steps))
    after = state * torch.exp(-slopes * length) + decayed.transpose(-1, -2) @ value
    return before + weights @ value, after
