"""DiffLlama: differential attention (Ye et al. 2024, arXiv 2410.05258), the difference of two heads' outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.adapters.base import AdaptedAttention, replace_all
from ulysses_infer.model.adapters.rotary import rotate_halves
from ulysses_infer.model.injection.rules import AttentionHeads
from ulysses_infer.parallel.sharding import Part, Sharding


def _halves(features: int, heads: AttentionHeads, count: int) -> Sharding:
    """The first halves of all pairs of heads, then the second halves."""
    pairs, layout = heads.num_key_value_heads // 2, heads.layout
    if layout is not None and pairs % layout.world_size:
        raise UnsupportedModelError(
            f"differential attention has {pairs} pairs of KV heads, which do not divide over {layout.world_size} ranks"
        )
    return Sharding((Part(count // 2, features // count),) * 2)


def query_halves(features: int, heads: AttentionHeads) -> Sharding:
    """`_halves` of query heads."""
    return _halves(features, heads, heads.num_attention_heads)


def key_value_halves(features: int, heads: AttentionHeads) -> Sharding:
    """`_halves` of KV heads."""
    return _halves(features, heads, heads.num_key_value_heads)


class DiffllamaAttention(AdaptedAttention):
    """A pair is heads i and i + H/2; both read the values of both KV heads of their pair, side by side."""

    replicated_parameters = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        halves = {"q_proj": query_halves, "k_proj": key_value_halves, "v_proj": key_value_halves}
        self.attention_rules = {name: ("column", rule) for name, rule in halves.items()}
        self.qk_head_dim, self.v_head_dim = self.head_dim, 2 * self.head_dim

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; position_embeddings: cosine and sine; returns ([1, t, D], None)."""
        pairs = self.head_plan.local_key_value_heads // 2
        query, key = (
            rotate_halves(self.heads(each(hidden_states)), *position_embeddings) for each in (self.q_proj, self.k_proj)
        )
        query, key = (each.unflatten(1, (2, pairs, -1)).transpose(1, 2).flatten(1, 3) for each in (query, key))
        value = torch.cat(self.heads(self.v_proj(hidden_states)).chunk(2, dim=1), dim=-1).repeat_interleave(2, dim=1)
        outputs = self.attend(query, key, value).unflatten(-1, (pairs, 2, -1, self.v_head_dim))
        first, second = outputs.unbind(3)
        difference = self.groupnorm(first - self._share() * second) * (1 - self.lambda_init)
        return self.o_proj(difference.flatten(2)), None

    def _share(self) -> torch.Tensor:
        """The part of the second head's output that is taken off, a learned number."""
        first, second = (
            (query * key).sum(dtype=torch.float32).exp().to(query.dtype)
            for query, key in ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2))
        )
        share: torch.Tensor = first - second + self.lambda_init
        return share


def adapt_diffllama(model: nn.Module) -> None:
    """Replace the attention modules."""
    replace_all(model, "DiffLlamaAttention", DiffllamaAttention)
