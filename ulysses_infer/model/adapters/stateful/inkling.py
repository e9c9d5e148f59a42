"""Inkling and Inkling 2: logits of relative positions, short convolutions in attention and in the residual stream."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.cache.states import StateShape
from ulysses_infer.model.adapters.base import Adapted, AdaptedAttention
from ulysses_infer.model.context import step_context, step_positions
from ulysses_infer.model.injection.rules import MLP_RULES, AttentionRule, key_value_heads, query_heads
from ulysses_infer.model.recurrent.history import History, KeepsStates

KEYS, VALUES = 0, 1  # numbers of the states of attention


def _convolved(history: History, tokens: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """A causal convolution in float32, plus its input. tokens: [t, C]; taps: [K, t | 1, C], the current token first."""
    wide = tokens.float()
    total = wide + wide * taps[0]
    for back, earlier in enumerate(history.before(tokens), start=1):
        total += earlier.float() * taps[back]
    return total


def _static_taps(weight: torch.Tensor) -> torch.Tensor:
    """weight: [C, K], of a convolution; returns [K, 1, C], the current token first."""
    return weight.t().flip(0)[:, None]


class ResidualConvolution(Adapted, KeepsStates):
    """A short convolution over the residual stream."""

    def __init__(self, source: Any, dtype: torch.dtype, scale: float) -> None:
        super().__init__(source)
        self.scale, self.dtype = scale, dtype
        self.history = History(self.layer_idx, self.conv_idx, self.conv_kernel_size - 1, is_sliced=True)

    def own_states(self) -> tuple[StateShape, ...]:
        """All channels of the residual stream."""
        return (self.history.shape(self.conv1d.in_channels, self.dtype),)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """hidden_states: [1, t, D]; returns the same shape."""
        own = hidden_states[0, : step_context().num_local_tokens]
        output = _convolved(self.history, own, _static_taps(self.conv1d.weight[:, 0])) * self.scale
        if not len(output):  # an empty slice runs a dummy token, whose output is unused
            return torch.zeros_like(hidden_states)
        return output.to(hidden_states.dtype)[None]


class InklingAttention(AdaptedAttention, KeepsStates):
    """Keys and values are convolved where a rank has all tokens of its heads; queries bring their relative states."""

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.attention_rules = {"r_proj": ("column", query_heads), "sink_proj": ("column", query_heads)}
        self.dtype = self.q_proj.weight.dtype
        count = self.config.sconv_kernel_size - 1
        self.histories = [History(self.layer_idx, index, count) for index in (KEYS, VALUES)]
        self.relative_width = self.config.d_rel

    def own_states(self) -> tuple[StateShape, ...]:
        """Those of the keys and values of own heads."""
        width = self.head_plan.shard_key_value_heads * self.head_dim
        return tuple(history.shape(width, self.dtype) for history in self.histories)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; returns ([1, t, D], None)."""
        query, relative = self.q_norm(self._split(self.q_proj, hidden_states)), self._split(self.r_proj, hidden_states)
        query, relative = self._scaled(query), self._scaled(relative)
        key, value = self._split(self.k_proj, hidden_states), self._split(self.v_proj, hidden_states)
        return self.o_proj(self._attended(torch.cat((query, relative), dim=-1), key, value)), None

    def _split(self, projection: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: [1, t, D]; returns [1, t, local heads, d]."""
        is_key = projection in (self.k_proj, self.v_proj)
        heads = self.head_plan.local_key_value_heads if is_key else self.head_plan.local_attention_heads
        projected: torch.Tensor = projection(hidden_states)
        return projected.unflatten(-1, (heads, -1))

    def _scaled(self, query: torch.Tensor) -> torch.Tensor:
        """Scaled up at late positions, in layers without a window. query: [1, t, H, d]; returns the same shape."""
        floor = self.config.log_scaling_n_floor
        if self.is_sliding or floor is None:
            return query
        late = torch.log(((step_positions() + 1).float() / floor).clamp(min=1.0))
        tau = 1.0 + self.config.log_scaling_alpha * late[:, None, None]
        return (query.float() * tau).to(query.dtype)

    def _attended(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query, key, value: [1, t, local heads, d and more]; returns [1, t, H/tp * d]."""
        heads = (each.transpose(1, 2) for each in (query, key, value))
        window = self.sliding_window
        return self.attend(*heads, scaling=self.scaling, sliding_window=window, prepare=self._prepared)

    def _prepared(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionOptions]:
        """query, key, value: [T, own heads, d and more] of all tokens; returns those of attention."""
        query, relative, *_ = query.split((self.head_dim, self.relative_width), dim=-1)
        key = self.k_norm(self._convolved(KEYS, key))
        return query, key, self._convolved(VALUES, value), self._with_relative(options, relative)

    def _with_relative(self, options: AttentionOptions, relative: torch.Tensor) -> AttentionOptions:
        """relative: [T, own heads, relative width]."""
        return replace(options, relative=relative @ self.rel_logits_proj.proj)

    def _convolved(self, which: int, heads: torch.Tensor) -> torch.Tensor:
        """The short convolution of keys or values, [T, own heads, d]."""
        weight = (self.k_sconv, self.v_sconv)[which].conv1d.weight[:, 0]
        output = _convolved(self.histories[which], heads.flatten(1), _static_taps(self._own_channels(weight)))
        return output.unflatten(-1, (-1, self.head_dim)).to(heads.dtype)

    def _own_channels(self, weight: torch.Tensor) -> torch.Tensor:
        """weight: [Hkv * d, K]; returns that of own heads."""
        return self.head_plan.of_key_value_shard(weight.unflatten(0, (-1, self.head_dim))).flatten(0, 1)


class Inkling2Attention(InklingAttention):
    """With a gate and a sink per token and head; in layers without a window, convolutions depend on the token."""

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.is_dynamic = hasattr(self.k_sconv, "weight_proj")
        if self.is_dynamic:
            rule: AttentionRule = "column", key_value_heads
            self.projections_elsewhere = tuple((each, "weight_proj", rule) for each in (self.k_sconv, self.v_sconv))

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_hidden_states: torch.Tensor | None = None,
        value_hidden_states: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states and those of keys and values, if others: [1, t, D]; returns ([1, t, D], None)."""
        query, relative = self._split(self.q_proj, hidden_states), self._split(self.r_proj, hidden_states)
        query, relative = self._scaled(self.q_l2_clip(query)), self._scaled(self.rel_l2_clip(relative))
        sink, gate = self._split(self.sink_proj, hidden_states), self.gate_proj(hidden_states)
        key = self._with_taps(self.k_proj, self.k_sconv, hidden_states, key_hidden_states)
        value = self._with_taps(self.v_proj, self.v_sconv, hidden_states, value_hidden_states)
        output = self._attended(torch.cat((query, relative, sink), dim=-1), key, value)
        return self.o_proj((output.float() * torch.sigmoid(gate.float())).to(output.dtype)), None

    def _with_taps(
        self, projection: nn.Module, convolution: Any, hidden: torch.Tensor, other: torch.Tensor | None
    ) -> torch.Tensor:
        """Keys or values, [1, t, local heads, d], and behind them, if they depend on the token, taps per head."""
        hidden = hidden if other is None else other
        heads = self._split(projection, hidden)
        if not self.is_dynamic:
            return heads
        taps = convolution.weight_proj(hidden).unflatten(-1, (heads.shape[2], -1))
        return torch.cat((heads, taps), dim=-1)

    def _prepared(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionOptions]:
        """query, key, value: [T, own heads, d and more] of all tokens; returns those of attention."""
        query, relative, sink = query.split((self.head_dim, self.relative_width, 1), dim=-1)
        key, value = self.k_l2_clip(self._convolved(KEYS, key)), self._convolved(VALUES, value)
        value = self.v_norm(value.float()).to(value.dtype)
        return query, key, value, replace(self._with_relative(options, relative), sinks=sink[..., 0])

    def _convolved(self, which: int, heads: torch.Tensor) -> torch.Tensor:
        """The short convolution of keys or values, [T, own heads, d and taps]."""
        convolution, width = (self.k_sconv, self.v_sconv)[which], self.head_dim
        own, kernel = heads[..., :width], self.config.sconv_kernel_size
        if self.is_dynamic:
            static = self._own_channels(convolution.static_weight.float().t()).t()[:, None]
            dynamic = heads[..., width:].float().permute(2, 0, 1).repeat_interleave(width, dim=2)
            output = _convolved(self.histories[which], own.flatten(1), static + dynamic) / math.sqrt(2 * kernel + 1)
        else:
            taps = _static_taps(self._own_channels(convolution.conv1d.weight[:, 0]))
            output = _convolved(self.histories[which], own.flatten(1), taps) / math.sqrt(kernel + 1)
        return output.unflatten(-1, (-1, width)).to(heads.dtype)


def adapt_inkling(model: Any) -> None:
    """Replace attention and the convolutions of the residual stream."""
    for layer in model.get_decoder().layers:
        dtype = layer.input_layernorm.weight.dtype
        layer.self_attn = InklingAttention(layer.self_attn)
        layer.attn_sconv = ResidualConvolution(layer.attn_sconv, dtype, 1.0)
        layer.mlp_sconv = ResidualConvolution(layer.mlp_sconv, dtype, 1.0)
        if hasattr(layer.mlp, "down_proj"):  # a dense layer; its output is scaled after the sum over the TP group
            layer.mlp.feed_forward_rules = {name: MLP_RULES[name] for name in ("gate_proj", "up_proj", "down_proj")}


def adapt_inkling2(model: Any) -> None:
    """Replace attention and the convolutions of the residual stream."""
    for layer in model.get_decoder().layers:
        dtype = layer.self_attn.q_proj.weight.dtype
        layer.self_attn = Inkling2Attention(layer.self_attn)
        for name in ("post_attention_convolution", "post_mlp_convolution"):
            source = getattr(layer, name)
            scale = 1 / math.sqrt(source.conv_kernel_size + 1)
            setattr(layer, name, ResidualConvolution(source, dtype, scale))
