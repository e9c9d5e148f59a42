"""Zaya: compressed convolutional attention (arXiv 2510.04476), which convolves queries and keys and delays values."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.cache.states import StateShape
from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.adapters.base import AdaptedAttention, replace_all
from ulysses_infer.model.adapters.rotary import rotate_halves
from ulysses_infer.model.injection.rules import AttentionHeads, key_value_heads
from ulysses_infer.model.recurrent.history import History, KeepsStates
from ulysses_infer.parallel.sharding import Sharding

QUERY_KEYS, VALUES = 0, 1  # numbers of the states


def groups_of_queries(features: int, heads: AttentionHeads) -> Sharding:
    """The query heads of a KV head, for every KV head."""
    if heads.layout is not None and heads.layout.is_padded:
        raise UnsupportedModelError(
            f"{heads.num_attention_heads} query heads in {heads.num_key_value_heads} groups, which are convolved, do "
            f"not divide over {heads.layout.world_size} ranks"
        )
    return key_value_heads(features, heads)


class ZayaAttention(AdaptedAttention, KeepsStates):
    """Convolutions, norms and rotary positions follow the exchange, where a rank has all tokens of its heads.

    A key depends on all queries of its group, which every rank with that key therefore computes.
    """

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        packed = self.qkv_proj
        self.projections_elsewhere = (
            (packed, "q_proj", ("column", groups_of_queries)),
            (packed, "k_proj", ("column", key_value_heads)),
        )
        self.dtype, self.group = packed.q_proj.weight.dtype, packed.num_key_value_groups
        self.num_heads_of_values = packed.num_key_value_heads
        mixed = History(self.layer_idx, QUERY_KEYS, packed.conv_kernel_size)
        self.histories = mixed, History(self.layer_idx, VALUES, 1)

    def own_states(self) -> tuple[StateShape, ...]:
        """Those of own queries and keys, and of own values."""
        keys = self.head_plan.shard_key_value_heads
        heads = self.head_plan.heads.query_slots + keys, keys
        sized = zip(self.histories, heads, strict=True)
        return tuple(history.shape(count * self.head_dim, self.dtype) for history, count in sized)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; position_embeddings: cosine and sine, each [1, t, r]; returns ([1, t, D], None)."""
        plan, packed = self.head_plan, self.qkv_proj
        groups = self.heads(packed.q_proj(hidden_states))
        first = plan.first_heads[0] - plan.first_heads[1] * self.group
        query = groups[:, first : first + plan.local_attention_heads]
        means = groups.unflatten(1, (-1, self.group)).mean(dim=2)
        half = position_embeddings[0].shape[-1] // 2
        angles = torch.cat([each[..., :half] for each in position_embeddings], dim=-1)[:, None]
        key = torch.cat(
            (self.heads(packed.k_proj(hidden_states)), means, angles.expand(-1, means.shape[1], -1, -1)), dim=-1
        )
        values = self.heads(torch.cat((packed.v_proj_current(hidden_states), self._undelayed(hidden_states)), dim=-1))
        value = values[:, plan.first_heads[1] : plan.first_heads[1] + plan.local_key_value_heads]
        options = {"scaling": self.scaling, "sliding_window": self.sliding_window, "prepare": self._prepared}
        return self.o_proj(self.attend(query, key, value, **options)), None

    def _undelayed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The values for the next token, without their bias, which the first token has, too."""
        projection = self.qkv_proj.v_proj_delayed
        projected: torch.Tensor = projection(hidden_states)
        return projected if projection.bias is None else projected - projection.bias

    def _prepared(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionOptions]:
        """query: [T, own heads, d]; key: [T, own KV heads, d of the key, d of the mean query, angles]; value: [T, own
        KV heads, d]; returns those of attention."""
        width, group = self.head_dim, query.shape[1] // key.shape[1]
        key, mean, angles = key.split((width, width, key.shape[-1] - 2 * width), dim=-1)
        mixed = self._convolved(torch.cat((query, key), dim=1))
        query = mixed[:, : query.shape[1]] + (query + key.repeat_interleave(group, dim=1)) * 0.5
        key = mixed[:, query.shape[1] :] + (mean + key) * 0.5
        temperature = self.head_plan.of_key_value_shard(self.qk_norm.temp)[:, None]
        cosine, sine = (torch.cat((each, each), dim=-1)[None] for each in angles[:, 0].chunk(2, dim=-1))
        query, key = self._normed(query), self._normed(key) * temperature
        query, key = (rotate_halves(each.transpose(0, 1)[None], cosine, sine)[0] for each in (query, key))
        return query.transpose(0, 1), key.transpose(0, 1), self._delayed(value), options

    def _convolved(self, heads: torch.Tensor) -> torch.Tensor:
        """A convolution per channel, then one per head. heads: [T, own heads and KV heads, d]; the same shape."""
        depthwise, grouped = self.qkv_proj.conv_qk_depthwise, self.qkv_proj.conv_qk_grouped
        inner, outer = (self._own_heads(each.weight) for each in (depthwise, grouped))
        tokens = [heads, *(each.view(heads.shape) for each in self.histories[QUERY_KEYS].before(heads.flatten(1)))]
        taps, output = inner.shape[-1], self._own_heads(grouped.bias)
        for back in range(outer.shape[-1]):
            mixed = self._own_heads(depthwise.bias)
            for further in range(taps):
                mixed = mixed + tokens[back + further] * inner[:, :, 0, taps - 1 - further]
            output = output + torch.einsum("thi,hoi->tho", mixed, outer[..., outer.shape[-1] - 1 - back])
        return output

    def _own_heads(self, per_channel: torch.Tensor) -> torch.Tensor:
        """per_channel: [(Hq + Hkv) * d, ...]; returns that of own query heads and KV heads, [heads, d, ...]."""
        heads = per_channel.unflatten(0, (-1, self.head_dim))
        query, key = heads.split((self.head_plan.num_attention_heads, self.head_plan.num_key_value_heads))
        return torch.cat((self.head_plan.of_shard(query), self.head_plan.of_key_value_shard(key)))

    def _normed(self, heads: torch.Tensor) -> torch.Tensor:
        """heads: [T, h, d]; returns them with the norm sqrt(d)."""
        norms = heads.norm(p=2, dim=-1, keepdim=True).clamp_min(torch.finfo(heads.dtype).eps)
        return heads * (self.head_dim**0.5 / norms)

    def _delayed(self, value: torch.Tensor) -> torch.Tensor:
        """The second half of the features of all values comes from the token before. value: [T, own KV heads, d]."""
        count, bias = self.num_heads_of_values * self.head_dim // 2, self.qkv_proj.v_proj_delayed.bias
        added = value.new_zeros(count) if bias is None else bias
        is_late = torch.arange(2 * count, device=value.device).view(-1, self.head_dim) >= count
        late = self.head_plan.of_key_value_shard(is_late)
        offset = self.head_plan.of_key_value_shard(F.pad(added, (count, 0)).view(-1, self.head_dim))
        (before,) = self.histories[VALUES].before(value.flatten(1))
        return torch.where(late, before.view(value.shape) + offset, value)


def adapt_zaya(model: Any) -> None:
    """Replace the attention modules."""
    replace_all(model, "ZayaAttention", ZayaAttention)
