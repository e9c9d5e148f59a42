"""The rule of RWKV's time mixing (Peng et al. 2023, arXiv 2305.13048): a weighted mean that decays per channel."""

from __future__ import annotations

from typing import Any

import torch

from ulysses_infer.cache.states import RECURRENT
from ulysses_infer.model.recurrent.rules import Input, OwnWeight, Rule
from ulysses_infer.parallel.sharding import Part, Sharding

NUMERATOR, DENOMINATOR, MAXIMUM = 0, 1, 2  # numbers of the recurrent states
NOTHING = -1e38  # logarithm of the weight of no token at all


def time_mixing(module: Any) -> Rule:
    """Each projection has an input of its own, all side by side in that of the layer."""
    channels = Part(module.attention_hidden_size)
    own = Sharding((channels,))
    return Rule(
        inputs=tuple(Input(name, own, before=f"input_of_{name}") for name in ("key", "value", "receptance")),
        output="output",
        output_part=channels,
        weights=(OwnWeight("time_decay", own), OwnWeight("time_first", own)),
        units={"channels": (channels.units, False)},
        forward=time_mixing_forward,
        returns_pair=True,
    )


def time_mixing_forward(view: Any, hidden_states: torch.Tensor, past_key_values: Any) -> torch.Tensor:
    """Instead of transformers' forward, which keeps all layers' states in one tensor. Returns [n, L, own channels]."""
    key, value, receptance = view.key(hidden_states), view.value(hidden_states), view.receptance(hidden_states)
    weight, wide = key.float(), value.float()
    before = [past_key_values.state(RECURRENT, which) for which in (NUMERATOR, DENOMINATOR, MAXIMUM)]
    if before[0] is None:
        before = [torch.zeros_like(weight[:, 0])] * 3
    before[MAXIMUM] = torch.where(before[DENOMINATOR] == 0, NOTHING, before[MAXIMUM])
    states = prefix_sums(-torch.exp(view.time_decay.float()), weight, wide, before)
    for which, state in enumerate(states):
        past_key_values.set(RECURRENT, state[:, -1], which)
    bonus = weight + view.time_first.float()
    numerator, denominator, _ = _joined([state[:, :-1] for state in states], (wide, torch.ones_like(wide), bonus))
    mean: torch.Tensor = torch.sigmoid(receptance) * (numerator / denominator).to(key.dtype)
    return mean


def prefix_sums(
    decay: torch.Tensor, key: torch.Tensor, value: torch.Tensor, before: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The states before the first token and after each, by doubling; transformers goes token by token.

    A state is the sum of weighted values and of weights, both divided by e^m, and m. decay: [C], the logarithm per
    token; key, value: [n, L, C]; before: the state, three times [n, C]; returns three times [n, L + 1, C], all float32.
    """
    tokens = value, torch.ones_like(value), key
    states = [torch.cat((old[:, None], new), dim=1) for old, new in zip(before, tokens, strict=True)]
    shift = 1
    while shift < states[0].shape[1]:
        numerator, denominator, most = (state[:, :-shift] for state in states)
        joined = _joined((numerator, denominator, most + shift * decay), [state[:, shift:] for state in states])
        states = [torch.cat((state[:, :shift], new), dim=1) for state, new in zip(states, joined, strict=True)]
        shift *= 2
    return states


def _joined(first: Any, second: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of two states."""
    most = torch.maximum(first[MAXIMUM], second[MAXIMUM])
    shares = torch.exp(first[MAXIMUM] - most), torch.exp(second[MAXIMUM] - most)
    numerator, denominator = (
        shares[0] * first[which] + shares[1] * second[which] for which in (NUMERATOR, DENOMINATOR)
    )
    return numerator, denominator, most
