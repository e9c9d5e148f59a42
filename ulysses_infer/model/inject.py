"""Adapt a transformers model to the step context: replace linears, norms and the head; name our functions.

Model mathematics stays transformers' own; what changes is which slice of it a rank computes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import nn

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model import attention, experts
from ulysses_infer.model.attention import ATTENTION_NAME, HeadPlan
from ulysses_infer.model.experts import EXPERTS_NAME, ExpertPlan, is_experts
from ulysses_infer.model.head import ShardedHead
from ulysses_infer.model.linear import ShiftLinear
from ulysses_infer.model.norm import PerHeadNorm, ShardedRMSNorm
from ulysses_infer.model.rules import (
    ATTENTION_INPUTS,
    ATTENTION_OUTPUTS,
    ATTENTION_RULES,
    KEY_NORMS,
    KEY_VALUE_COUNT_NAMES,
    LATENT_NAMES,
    MLP_RULES,
    PACKED_MLP_INPUTS,
    QUERY_COUNT_NAMES,
    QUERY_NORMS,
    Heads,
)
from ulysses_infer.parallel.layout import Layout, Place, check_heads
from ulysses_infer.parallel.sharding import Part

logger = logging.getLogger(__name__)

ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


class Bound(Protocol):
    """Anything that reads its weights differently in each mode."""

    def bind(self, place: Place) -> None: ...


class HeadCounts:
    """Keeps the head counts that an attention module's forward reshapes with equal to its local ones."""

    def __init__(self, module: nn.Module, local_config: Any, plan: HeadPlan) -> None:
        self.module, self.local_config, self.plan = module, local_config, plan
        self.query_names = _counts(module, QUERY_COUNT_NAMES, plan.num_attention_heads)
        self.key_value_names = _counts(module, KEY_VALUE_COUNT_NAMES, plan.num_key_value_heads)

    def bind(self, place: Place) -> None:
        """Set the counts of `place`'s mode on the module and on its own copy of the config."""
        self.plan.bind(place)
        self.local_config.num_attention_heads = self.plan.local_attention_heads
        for name in self.query_names:
            setattr(self.module, name, self.plan.local_attention_heads)
        for name in self.key_value_names:
            setattr(self.module, name, self.plan.local_key_value_heads)


class Injection:
    """One injected model: what was replaced, what is read per mode, what stayed whole.

    `model` may still be on the meta device; the checkpoint loader then fills what `slices` says this rank keeps.
    """

    def __init__(self, model: Any, layout: Layout, shard: int) -> None:
        self.model, self.layout = model, layout
        self.base = layout.place(layout.base, shard)
        self.config = model.config.get_text_config(decoder=True)
        self.bound: list[Bound] = []
        self.whole: list[str] = []
        attention.register()
        experts.register()
        self.config._attn_implementation = ATTENTION_NAME
        self.config._experts_implementation = EXPERTS_NAME
        self.local_config = copy.copy(self.config)
        self._check_layer_types()
        self.attention_layers = self._inject_attention()
        self._inject_experts()
        self._inject_mlps()
        self.head_name, self.head = self._inject_head()
        self._note_whole()

    def bind(self, place: Place) -> None:
        """Make every layer read its weights as `place` needs them; called when the mode changes."""
        for bound in self.bound:
            bound.bind(place)

    def slices(self, name: str) -> tuple[int, list[Any]] | None:
        """What this rank keeps of the full parameter `name`: (dimension, spans), or None for all of it."""
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        if isinstance(owner, ShiftLinear | ShardedHead):
            return owner.slices(leaf)
        plan = getattr(owner, "expert_plan", None)
        return plan.slices(leaf) if plan is not None else None

    # -- attention ---------------------------------------------------------------------------------------------

    def _check_layer_types(self) -> None:
        foreign = sorted(set(getattr(self.config, "layer_types", None) or ()) - ATTENTION_KINDS)
        if foreign:
            raise UnsupportedModelError(
                f"model type {self.config.model_type!r} has {', '.join(foreign)} layers; this engine knows "
                f"{', '.join(sorted(ATTENTION_KINDS))}"
            )

    def _inject_attention(self) -> list[nn.Module]:
        layers = []
        for name, module in list(self.model.named_modules()):
            if hasattr(module, "layer_idx") and _child_named(module, ATTENTION_INPUTS):
                self._inject_attention_layer(name, module)
                layers.append(module)
        if not layers:
            raise UnsupportedModelError(
                f"no attention layer of model type {self.config.model_type!r} has a projection this engine can cut "
                f"(known: {', '.join(ATTENTION_INPUTS)})"
            )
        return layers

    def _inject_attention_layer(self, name: str, module: nn.Module) -> None:
        if _child_named(module, ATTENTION_OUTPUTS) is None:
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) has no output projection this engine knows "
                f"({', '.join(ATTENTION_OUTPUTS)})"
            )
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(f"{name} ({type(module).__name__}) is not causal: its tokens see later ones")
        heads = attention_heads(module, self.config)
        check_heads(self.layout, heads.num_attention_heads, heads.num_key_value_heads)
        plan = HeadPlan(heads.num_attention_heads, heads.num_key_value_heads)
        untyped = cast(Any, module)
        untyped.head_plan = plan
        untyped.attention_chunk_size = _chunk_size(self.config, untyped.layer_idx)
        self._check_children(name, module)
        for child, linear in _linears(module):
            if child in ATTENTION_RULES:
                cut, rule = ATTENTION_RULES[child]
                self._replace(module, child, ShiftLinear(linear, cut, rule(linear, heads), self.base))
        self._inject_norms(module, heads)
        untyped.config = self.local_config
        self.bound.append(HeadCounts(module, self.local_config, plan))

    def _inject_norms(self, module: nn.Module, heads: Heads) -> None:
        """Query and key norms over more than one head follow the mode; norms over a single head need nothing."""
        for child, count, shared in (
            *((name, heads.num_attention_heads, False) for name in QUERY_NORMS),
            *((name, heads.num_key_value_heads, True) for name in KEY_NORMS),
        ):
            norm = getattr(module, child, None)
            weight = getattr(norm, "weight", None)
            if weight is None or not isinstance(norm, nn.Module):
                continue
            if weight.dim() == 2:
                self._replace(module, child, PerHeadNorm(norm, Part(count, shared=shared)))
            elif weight.numel() > self._head_width(module):
                self._replace(module, child, ShardedRMSNorm(norm, Part(count, weight.numel() // count, shared)))

    def _head_width(self, module: nn.Module) -> int:
        width = getattr(module, "head_dim", None) or getattr(self.config, "head_dim", None)
        return int(width or self.config.hidden_size // self.config.num_attention_heads)

    def _check_children(self, name: str, module: nn.Module) -> None:
        """Refuse an attention module with weights between its projections that no rule covers."""
        known = {*ATTENTION_RULES, *QUERY_NORMS, *KEY_NORMS, *LATENT_NAMES}
        for child, part in module.named_children():
            if child not in known and any(True for _ in part.parameters()):
                raise UnsupportedModelError(
                    f"{name}.{child} ({type(part).__name__}) has weights inside attention that no sharding rule covers"
                )

    # -- feed-forward ------------------------------------------------------------------------------------------

    def _inject_experts(self) -> None:
        for module in self.model.modules():
            if is_experts(module):
                untyped = cast(Any, module)
                if getattr(untyped, "has_post_expert_norm", False):
                    raise UnsupportedModelError(f"{type(module).__name__} normalises each expert's output")
                plan = ExpertPlan(module, self.base)
                untyped.expert_plan = plan
                untyped.config = self.config
                _shrink(module, plan)
                self.bound.append(plan)

    def _inject_mlps(self) -> None:
        attention_modules = set(self.attention_layers)
        for module in list(self.model.modules()):
            if module not in attention_modules and _is_plain_mlp(module):
                for child, linear in _linears(module):
                    if child in MLP_RULES:
                        cut, rule = MLP_RULES[child]
                        self._replace(module, child, ShiftLinear(linear, cut, rule(linear), self.base))

    # -- head --------------------------------------------------------------------------------------------------

    def _inject_head(self) -> tuple[str, ShardedHead]:
        head = self.model.get_output_embeddings()
        name = next((name for name, module in self.model.named_modules() if module is head), None)
        if name is None or not isinstance(head, nn.Linear):
            raise UnsupportedModelError(f"{type(self.model).__name__} has no linear vocabulary head")
        embedding = self.model.get_input_embeddings()
        tied = bool(self.config.tie_word_embeddings or self.model.config.tie_word_embeddings)
        sharded = ShardedHead(head, self.base, embedding if tied else None)
        self.head_vocab_size = head.out_features
        owner, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(owner), leaf, sharded)
        return name, sharded

    def _replace(self, parent: nn.Module, child: str, replacement: nn.Module) -> None:
        setattr(parent, child, replacement)
        self.bound.append(cast(Bound, replacement))

    def _note_whole(self) -> None:
        """Remember (and log) the linear layers that every rank computes in full."""
        self.whole = sorted({_pattern(name) for name, module in self.model.named_modules() if _is_linear(module)})
        if self.whole:
            logger.info("whole on every rank: %s", ", ".join(self.whole))


def attention_heads(module: nn.Module, config: Any) -> Heads:
    """Head counts of an attention layer. Latent attention (MLA) expands one latent to as many KV as query heads."""
    query_heads = getattr(module, "num_heads", None) or config.num_attention_heads
    packed = hasattr(module, "query_key_value") or hasattr(module, "kv_b_proj")
    if packed:
        return Heads(query_heads, query_heads)
    key_value_heads = getattr(module, "num_key_value_heads", None) or getattr(config, "num_key_value_heads", None)
    return Heads(int(query_heads), int(key_value_heads or query_heads))


def freeze_rotary(model: nn.Module, max_model_len: int) -> None:
    """Fix rotary frequencies that transformers recomputes from each batch's longest position.

    `dynamic` and `longrope` would make a token depend on its neighbours in a mixed batch; they are computed once for
    the longest sequence the engine takes.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and _moves(kinds):
            _settle(module, max_model_len, None)
            cast(Any, module).rope_type = "frozen"
        elif isinstance(kinds, dict):
            for layer_type in [key for key, kind in kinds.items() if _moves(kind)]:
                _settle(module, max_model_len, layer_type)
                kinds[layer_type] = "frozen"


def _moves(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


def _settle(module: nn.Module, max_model_len: int, layer_type: str | None) -> None:
    last = torch.tensor([[max_model_len - 1]])
    extra = {} if layer_type is None else {"layer_type": layer_type}
    module(torch.zeros(1, 1, 1), last, **extra)


def _shrink(module: nn.Module, plan: ExpertPlan) -> None:
    """Replace the full expert weights (still without memory) by ones of the stored slice's shape."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        kept = plan.slices(name)
        shape = list(parameter.shape)
        if kept is not None:
            shape[kept[0]] = sum(span.size for span in kept[1])
        setattr(module, name, nn.Parameter(parameter.new_empty(shape), requires_grad=False))


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, child in list(module.named_children()):
        if _is_linear(child):
            yield name, cast(nn.Linear, child)


def _child_named(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name, _ in _linears(module) if name in names), None)


def _is_plain_mlp(module: nn.Module) -> bool:
    """A feed-forward block whose weights are its known linears: some cut by column, then one by row of equal width."""
    found = dict(_linears(module))
    columns = [name for name in found if MLP_RULES.get(name, ("",))[0] == "column"]
    rows = [name for name in found if MLP_RULES.get(name, ("",))[0] == "row"]
    if not columns or len(rows) != 1:
        return False
    width = found[rows[0]].in_features
    packed = len(columns) == 1 and columns[0] in PACKED_MLP_INPUTS
    widths_agree = all(found[name].out_features == (2 * width if packed else width) for name in columns)
    return widths_agree and not _has_stray_weights(module, set(columns + rows))


def _has_stray_weights(module: nn.Module, covered: set[str]) -> bool:
    """Weights between the projections (an inner norm, a learned activation) would see only a part of the width.

    A decoder layer that holds its linears directly (opt) has norms and attention beside them, which is fine: those act
    on the residual stream.
    """
    if any(True for _ in module.parameters(recurse=False)):
        return True
    is_layer = any(hasattr(child, "layer_idx") for child in module.children())
    others = [child for name, child in module.named_children() if name not in covered]
    return not is_layer and any(any(True for _ in child.parameters()) for child in others)


def _chunk_size(config: Any, layer_index: int) -> int | None:
    """llama4 attends within chunks on some layers; its modeling code says so only through the mask."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[layer_index] == "chunked_attention":
        return int(config.attention_chunk_size)
    return None


def _counts(module: nn.Module, names: tuple[str, ...], value: int) -> list[str]:
    return [name for name in names if getattr(module, name, None) == value]


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
