"""Sharding rules of linear layers, by their names in transformers' models.

transformers' own `tp_plan`s are not enough: several families have none, others replicate packed projections (see
docs/models.md). Linear layers without a rule are replicated on every rank, which is slower but correct.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ulysses_infer.model.layers.linear import Cut
from ulysses_infer.parallel.head_layout import HeadLayout, divide_heads
from ulysses_infer.parallel.layout import Layout
from ulysses_infer.parallel.sharding import Part, Sharding


@dataclass(frozen=True)
class AttentionHeads:
    """Head counts of a whole attention layer, and their layout on the ranks once it is known."""

    num_attention_heads: int
    num_key_value_heads: int
    layout: HeadLayout | None = None

    def on(self, layout: Layout) -> AttentionHeads:
        """These heads on the ranks of `layout`. Raises `ConfigError` if they do not divide and are not padded."""
        return replace(self, layout=divide_heads(layout, self.num_attention_heads, self.num_key_value_heads))

    def query_part(self, features: int) -> Part:
        """`features` as query heads."""
        return Part(self.num_attention_heads, features // self.num_attention_heads, heads=self.layout)

    def key_value_part(self, features: int) -> Part:
        """`features` as key/value heads."""
        width = features // self.num_key_value_heads
        return Part(self.num_key_value_heads, width, shared=True, heads=self.layout)


# A rule returns the sharding of the features along the cut: outputs of a column cut, inputs of a row cut.
AttentionRule = tuple[Cut, Callable[[int, AttentionHeads], Sharding]]
MlpRule = tuple[Cut, Callable[[int], Sharding]]


def query_heads(features: int, heads: AttentionHeads) -> Sharding:
    """One part per query head: q alone, or q, k and v of a head next to each other."""
    return Sharding((heads.query_part(features),))


def key_value_heads(features: int, heads: AttentionHeads) -> Sharding:
    """One part per KV head."""
    return Sharding((heads.key_value_part(features),))


def packed_heads(features: int, heads: AttentionHeads) -> Sharding:
    """q, k and v one after another (phi3, gpt2)."""
    width = features // (heads.num_attention_heads + 2 * heads.num_key_value_heads)
    query = heads.query_part(heads.num_attention_heads * width)
    key_value = heads.key_value_part(heads.num_key_value_heads * width)
    return Sharding((query, key_value, key_value))


def _neurons(features: int) -> Sharding:
    return Sharding((Part(features),))


def _packed_neurons(features: int) -> Sharding:
    """gate and up one after another."""
    return Sharding((Part(features // 2), Part(features // 2)))


ATTENTION_RULES: dict[str, AttentionRule] = {
    "q_proj": ("column", query_heads),
    "k_proj": ("column", key_value_heads),
    "v_proj": ("column", key_value_heads),
    "qkv_proj": ("column", packed_heads),
    "Wqkv": ("column", packed_heads),
    "c_attn": ("column", packed_heads),
    # [q, k, v] interleaved per head (gpt_neox): like query heads of three times the width.
    "query_key_value": ("column", query_heads),
    # Multi-head latent attention: the down projections are replicated, the up projections to heads are sharded.
    "q_b_proj": ("column", query_heads),
    "q_gate_proj": ("column", query_heads),  # a query and a gate next to each other per head
    "kv_b_proj": ("column", query_heads),
    # Gates over the attention output, one value or one vector per query head.
    "gate_proj": ("column", query_heads),
    "g_proj": ("column", query_heads),
    **dict.fromkeys(("o_proj", "out_proj", "dense", "Wo", "c_proj"), ("row", query_heads)),
}
ATTENTION_OUTPUTS = tuple(name for name, (cut, _) in ATTENTION_RULES.items() if cut == "row")
ATTENTION_INPUTS = ("q_proj", "q_b_proj", "q_gate_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")

# Norms inside attention. Those over a single head need no sharding.
QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm", "attn_sub_norm")
KEY_NORMS = ("k_norm", "k_layernorm", "key_layernorm")
VALUE_NORMS = ("v_norm",)
# Multi-head latent attention: weights before the up projections, replicated on every rank.
LATENT_NAMES = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm", "k_rope_only_layernorm")
# The index of learned sparse attention, replicated on every rank: see `model/layers/key_index.py`.
INDEX = "indexer"
# Modules inside attention whose parameters have one entry per query head (mistral_large4, inkling2).
PER_HEAD = ("softmax_scaling", "q_l2_clip", "rel_l2_clip")

MLP_RULES: dict[str, MlpRule] = {
    **dict.fromkeys(("gate_proj", "up_proj", "fc1", "c_fc", "w1", "w3", "dense_h_to_4h"), ("column", _neurons)),
    **dict.fromkeys(("fc_in", "linear_1", "proj_up", "proj_up_gate"), ("column", _neurons)),
    **dict.fromkeys(("gate_up_proj", "Wi", "proj_up_gate_z"), ("column", _packed_neurons)),
    **dict.fromkeys(
        ("down_proj", "fc2", "c_proj", "w2", "dense_4h_to_h", "fc_out", "Wo", "proj_down"), ("row", _neurons)
    ),
}
PACKED_MLP_INPUTS = ("gate_up_proj", "Wi", "proj_up_gate_z")

# Names under which attention modules keep head counts, or the width of all heads, that their forward reshapes with.
QUERY_COUNT_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_VALUE_COUNT_NAMES = ("num_key_value_heads", "num_kv_heads", "kv_heads")
QUERY_WIDTH_NAMES = ("split_size", "embed_dim")  # only with a packed `c_attn`, whose output is split by them
KEY_VALUE_WIDTH_NAMES = ("kv_dim",)
