"""Which linear layers are cut and how, read off the names and shapes that transformers' models share.

transformers' own `tp_plan`s are hints made for another runtime: several families have none, others keep packed
projections whole (see docs/models.md). A rule here is a name, matched whole, and the sharding it implies; a layer no
rule knows stays whole on every rank, which is slower but right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ulysses_infer.model.linear import Cut
from ulysses_infer.parallel.sharding import Part, Sharding


@dataclass(frozen=True)
class Heads:
    """Head counts of a whole attention layer."""

    num_attention_heads: int
    num_key_value_heads: int

    def query_part(self, features: int) -> Part:
        return Part(self.num_attention_heads, features // self.num_attention_heads)

    def key_value_part(self, features: int) -> Part:
        return Part(self.num_key_value_heads, features // self.num_key_value_heads, shared=True)


AttentionRule = tuple[Cut, Callable[[nn.Linear, Heads], Sharding]]
MlpRule = tuple[Cut, Callable[[nn.Linear], Sharding]]


def _by_query_head(linear: nn.Linear, heads: Heads) -> Sharding:
    return Sharding((heads.query_part(linear.out_features),))


def _by_key_value_head(linear: nn.Linear, heads: Heads) -> Sharding:
    return Sharding((heads.key_value_part(linear.out_features),))


def _into_query_heads(linear: nn.Linear, heads: Heads) -> Sharding:
    return Sharding((heads.query_part(linear.in_features),))


def _packed_heads(linear: nn.Linear, heads: Heads) -> Sharding:
    """q, k and v one after another (phi3)."""
    width = linear.out_features // (heads.num_attention_heads + 2 * heads.num_key_value_heads)
    query = Part(heads.num_attention_heads, width)
    key_value = Part(heads.num_key_value_heads, width, shared=True)
    return Sharding((query, key_value, key_value))


def _outputs(linear: nn.Linear) -> Sharding:
    return Sharding((Part(linear.out_features),))


def _packed_outputs(linear: nn.Linear) -> Sharding:
    """gate and up one after another."""
    return Sharding((Part(linear.out_features // 2), Part(linear.out_features // 2)))


def _inputs(linear: nn.Linear) -> Sharding:
    return Sharding((Part(linear.in_features),))


ATTENTION_RULES: dict[str, AttentionRule] = {
    "q_proj": ("column", _by_query_head),
    "k_proj": ("column", _by_key_value_head),
    "v_proj": ("column", _by_key_value_head),
    "qkv_proj": ("column", _packed_heads),
    # One [q, k, v] triple after another, a head at a time (gpt_neox): a query-head rule of three times the width.
    "query_key_value": ("column", _by_query_head),
    # Multi-head latent attention: the low-rank inputs stay whole, the expansions to heads are cut.
    "q_b_proj": ("column", _by_query_head),
    "kv_b_proj": ("column", _by_query_head),
    # Gates over the attention output, a value or a width a query head.
    "gate_proj": ("column", _by_query_head),
    "g_proj": ("column", _by_query_head),
    "o_proj": ("row", _into_query_heads),
    "out_proj": ("row", _into_query_heads),
    "dense": ("row", _into_query_heads),
}
ATTENTION_OUTPUTS = tuple(name for name, (cut, _) in ATTENTION_RULES.items() if cut == "row")
ATTENTION_INPUTS = ("q_proj", "q_b_proj", "qkv_proj", "query_key_value")

MLP_RULES: dict[str, MlpRule] = {
    **{name: ("column", _outputs) for name in ("gate_proj", "up_proj", "fc1", "c_fc", "w1", "w3", "dense_h_to_4h")},
    **{name: ("column", _outputs) for name in ("fc_in", "linear_1")},
    "gate_up_proj": ("column", _packed_outputs),
    **{name: ("row", _inputs) for name in ("down_proj", "fc2", "c_proj", "w2", "dense_4h_to_h", "fc_out")},
}

# Names under which attention modules keep head counts that their forward uses to reshape.
QUERY_COUNT_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_VALUE_COUNT_NAMES = ("num_key_value_heads", "num_kv_heads")
