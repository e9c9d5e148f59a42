"""The rule of Griffin's recurrent block (RecurrentGemma): a short convolution and a gated linear recurrence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from ulysses_infer.cache.states import RECURRENT
from ulysses_infer.model.recurrent.rules import Input, Owner, OwnWeight, Rule, convolution
from ulysses_infer.parallel.sharding import Part, Sharding

STARTED = 1  # number of the recurrent state that is 1 once a sequence has a token


def recurrent_block(module: Any) -> Rule:
    """Gates are products with one matrix per block of channels."""
    blocks = module.rg_lru.num_attention_heads
    channels, each = Part(blocks, module.rg_lru.block_width), Sharding((Part(blocks),))
    own = Sharding((channels,))
    gates = [f"rg_lru.{gate}_gate_{kind}" for gate in ("input", "recurrent") for kind in ("weight", "bias")]
    return Rule(
        inputs=(Input("linear_x", own), Input("linear_y", own)),
        output="linear_out",
        output_part=channels,
        weights=(
            *convolution("conv_1d", own),
            OwnWeight("rg_lru.recurrent_param", own),
            *(OwnWeight(name, each) for name in gates),
        ),
        counts={"rg_lru.num_attention_heads": each.parts},
        units={"blocks of channels": (blocks, False)},
        replaced=_scan,
        forward=recurrent_block_forward,
        returns_pair=True,
    )


def _scan(_: Any, __: Owner) -> Mapping[str, Any]:
    return {"rg_lru._rnn_scan": scan}


def recurrent_block_forward(view: Any, hidden_states: torch.Tensor, past_key_values: Any) -> torch.Tensor:
    """Instead of transformers' forward, which keeps states in the module. Returns [n, L, own channels]."""
    x = view.linear_x(hidden_states).transpose(1, 2)
    kernel, length = view.conv1d_width, x.shape[-1]
    joined = past_key_values.update_conv_state(x, view.layer_idx, conv_kernel_size=kernel)
    weight, bias = view.conv_1d.weight, view.conv_1d.bias
    x = F.conv1d(F.pad(joined, (kernel - 1, 0)), weight, bias, groups=weight.shape[0])[..., -length:]
    started = past_key_values.state(RECURRENT, STARTED)
    positions = torch.ones_like(x[:, 0])  # the recurrence only asks which are 0
    positions[:, 0] = 0.0 if started is None else started[:, 0]
    view.rg_lru.recurrent_states = past_key_values.state(RECURRENT)
    output: torch.Tensor = view.rg_lru(x.transpose(1, 2), positions) * view.act_fn(view.linear_y(hidden_states))
    past_key_values.set(RECURRENT, view.rg_lru.recurrent_states)
    past_key_values.set(RECURRENT, positions.new_ones(len(positions), 1), STARTED)
    return output


def scan(
    hidden_states: torch.Tensor,
    recurrent_gate: torch.Tensor,
    reset: torch.Tensor,
    recurrent_states: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Instead of transformers' scan, which goes token by token: by doubling.

    hidden_states, recurrent_gate: [n, L, C]; reset: [n, L, 1]; recurrent_states: [n, C]; returns the states after each
    token, [n, L, C], and after the last, [n, C] float32.
    """
    decay, states, shift = (recurrent_gate * ~reset).float(), hidden_states.float(), 1
    while shift < states.shape[1]:
        before = states[:, :-shift] * decay[:, shift:]
        states = torch.cat((states[:, :shift], states[:, shift:] + before), dim=1)
        decay = torch.cat((decay[:, :shift], decay[:, shift:] * decay[:, :-shift]), dim=1)
        shift *= 2
    if recurrent_states is not None:
        states = states + decay * recurrent_states[:, None]
    return states.to(hidden_states.dtype), states[:, -1]
