"""DeepSeek-V4: keys compressed from several tokens beside a sliding window, and outputs projected by groups of heads.

Two ways to compress (see transformers' `DeepseekV4HCACompressor` and `DeepseekV4CSACompressor`): *heavily*, each entry
a gated mean of its own tokens, all of which a token attends to; and *sparsely*, with entries that overlap and an index
that selects among them. `model/layers/compressed.py` caches both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.attention.index import IndexQueries
from ulysses_infer.errors import ConfigError
from ulysses_infer.model.adapters.base import AdaptedAttention, replace_all
from ulysses_infer.model.adapters.rotary import rotate_last_pairs
from ulysses_infer.model.context import step_context
from ulysses_infer.model.injection.rules import AttentionHeads
from ulysses_infer.model.layers.compressed import entry_shapes, select
from ulysses_infer.parallel.layout import divisors
from ulysses_infer.parallel.sharding import Part, Sharding

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, each [1, t, r/2]."""


class Compressor:
    """How one layer compresses tokens (`Compression`); its modules are those of transformers' compressor."""

    def __init__(self, module: Any, window: int) -> None:
        self.module, self.window = module, window
        self.tokens, self.width = module.compress_rate, module.head_dim
        self.overlaps = hasattr(module, "indexer")
        self.reach = 2 * self.tokens if self.overlaps else self.tokens
        self.parts = [module, module.indexer] if self.overlaps else [module]
        self.index_width = module.indexer.head_dim if self.overlaps else 0
        self.top_k = module.indexer.index_topk if self.overlaps else 0
        self._widths = [each.kv_proj.out_features for each in self.parts for _ in range(2)]
        self.input_width = sum(self._widths)

    def inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [t, D]; returns values and gates of the compressor, then of its index, [t, input width]."""
        return torch.cat(
            [projection(hidden) for each in self.parts for projection in (each.kv_proj, each.gate_proj)], -1
        )

    def compress(self, inputs: torch.Tensor, exists: torch.Tensor, numbers: torch.Tensor) -> list[torch.Tensor]:
        """See `Compression.compress`."""
        columns = inputs.split(self._widths, dim=-1)
        pairs = zip(self.parts, columns[::2], columns[1::2], strict=True)
        return [self._entries(part, values, gates, exists, numbers) for part, values, gates in pairs]

    def _entries(
        self, part: Any, values: torch.Tensor, gates: torch.Tensor, exists: torch.Tensor, numbers: torch.Tensor
    ) -> torch.Tensor:
        """values, gates: [E, reach, width], or twice as wide if entries overlap; returns [E, width]."""
        bias = part.position_bias
        if self.overlaps:  # an entry has the first half of the tokens before its own, and the second half of its own
            values, gates = self._halves(values), self._halves(gates)
            bias = self._halves(bias.repeat(2, 1)[None])[0]
        gates = (gates + bias).masked_fill(~exists[..., None], float("-inf"))
        weights = gates.softmax(dim=1, dtype=torch.float32).to(values.dtype)
        entries = part.kv_norm((values.masked_fill(~exists[..., None], 0.0) * weights).sum(dim=1))
        rotation = part.rotary_emb(entries, position_ids=(numbers * self.tokens)[None], layer_type=part.rope_layer_type)
        return rotate_last_pairs(entries[None, None], *rotation)[0, 0]

    def _halves(self, rows: torch.Tensor) -> torch.Tensor:
        """rows: [E, 2 * tokens, 2 * width]; returns [E, 2 * tokens, width]."""
        width = rows.shape[-1] // 2
        return torch.cat((rows[:, : self.tokens, :width], rows[:, self.tokens :, width:]), dim=1)

    def queries(self, hidden: torch.Tensor, residual: torch.Tensor, rotation: Rotation) -> IndexQueries:
        """hidden: [t, D]; residual: [t, rank], what queries are projected from."""
        indexer = self.module.indexer
        heads = indexer.q_b_proj(residual).unflatten(-1, (-1, indexer.head_dim)).transpose(0, 1)
        query = rotate_last_pairs(heads[None], *rotation)[0].transpose(0, 1)
        scorer = indexer.scorer
        weights = scorer.weights_proj(hidden).float() * (scorer.weights_scaling * scorer.softmax_scale)
        return IndexQueries(query.contiguous(), weights.contiguous(), self.top_k)


def groups_of_heads(features: int, heads: AttentionHeads, groups: int) -> Sharding:
    """Equal features of `groups` groups of heads. Ranks with parts of the same group share its features.

    Raises `ConfigError` if groups or their heads do not divide over the ranks.
    """
    if heads.layout is not None:
        _check_groups(heads.num_attention_heads, groups, heads.layout.world_size)
    return Sharding((Part(groups, features // groups, shared=True),))


def _check_groups(heads: int, groups: int, world_size: int) -> None:
    if not _groups_fit(heads, groups, world_size):
        fitting = [size for size in divisors(heads) if _groups_fit(heads, groups, size)]
        raise ConfigError(
            f"{heads} heads in {groups} groups, which the output projection takes together, do not divide over sp * tp "
            f"= {world_size} ranks; use sp * tp = {', '.join(map(str, fitting))}"
        )


def _groups_fit(heads: int, groups: int, world_size: int) -> bool:
    return heads % world_size == 0 and all(groups % size == 0 or size % groups == 0 for size in divisors(world_size))


class DeepseekV4Attention(AdaptedAttention):
    """One key per token, which is also its value; its rotation is undone in the output."""

    values_are_keys = True
    read_weights = ("o_a_proj",)

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        self.groups = self.config.o_groups
        self.group_heads = self.num_heads // self.groups
        self.attention_rules = {
            "o_a_proj": ("column", self._groups),
            "o_b_proj": ("row", self._groups),
        }
        compressor: Any = self.compressor
        self.kind = None if compressor is None else Compressor(compressor, self.sliding_window)
        if self.kind is not None:
            self.cache_entries = entry_shapes(self.layer_idx, self.kind)

    def _groups(self, features: int, heads: AttentionHeads) -> Sharding:
        return groups_of_heads(features, heads, self.groups)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: dict[str, Rotation], **_: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; returns ([1, t, D], None)."""
        rotation = position_embeddings[self.rope_layer_type]
        residual = self.q_a_norm(self.q_a_proj(hidden_states))
        query = rotate_last_pairs(self.q_b_norm(self.heads(self.q_b_proj(residual))), *rotation)
        key = rotate_last_pairs(self.kv_norm(self.kv_proj(hidden_states))[:, None], *rotation)
        selection = None
        if (kind := self.kind) is not None:
            hidden = hidden_states[0]
            selection = select(
                self.layer_idx, kind, kind.inputs(hidden), lambda: kind.queries(hidden, residual[0], rotation)
            )
        options = {"scaling": self.scaling, "sliding_window": self.sliding_window, "s_aux": self.sinks}
        output = self.heads(self.attend(query, key, key, indices=selection, **options))
        cosine, sine = rotation
        output = rotate_last_pairs(output, cosine, -sine)[0].transpose(0, 1)
        return self.o_b_proj(self._by_group(output)[None]), None

    def _by_group(self, output: torch.Tensor) -> torch.Tensor:
        """The grouped projection. output: [t, H, d], local heads; returns [t, local groups * rank].

        With parts of a group, a rank computes a term of a sum that the next projection, which is linear, passes on.
        """
        place, heads = step_context().collectives.place, output.shape[1]
        weight = self.o_a_proj.reader(place)(output.dtype).unflatten(1, (self.group_heads, -1))
        if heads < self.group_heads:
            first = place.weight_index * heads % self.group_heads
            weight = weight[:, first : first + heads]
        groups = max(1, heads // self.group_heads)
        inputs = output.reshape(len(output), groups, -1).transpose(0, 1)
        projected = torch.bmm(inputs, weight.flatten(1).unflatten(0, (groups, -1)).transpose(1, 2))
        return projected.transpose(0, 1).flatten(1)


def adapt_deepseek_v4(model: nn.Module) -> None:
    """Replace the attention modules."""
    replace_all(model, "DeepseekV4Attention", DeepseekV4Attention)
