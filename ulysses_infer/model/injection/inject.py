"""Injection: replaces linears, norms, experts, attention and the head of a transformers model by sharded ones.

The rest of the modeling code stays that of transformers.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model import experts
from ulysses_infer.model.adapters.registry import adapt
from ulysses_infer.model.experts import EXPERTS_NAME, ExpertLayer, ScaledInputExperts, is_experts, scales_inputs
from ulysses_infer.model.injection.attention import AttentionInjector, KeepsViews, ModeAware
from ulysses_infer.model.injection.rules import MLP_RULES, PACKED_MLP_INPUTS, MlpRule
from ulysses_infer.model.layers import attention
from ulysses_infer.model.layers.attention import ATTENTION_NAME
from ulysses_infer.model.layers.linear import ShiftLinear, cut_features, is_linear
from ulysses_infer.model.layers.sparsity import ShardedTopK
from ulysses_infer.model.quantization.layers import replace_whole, shift_linear
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.recurrent.find import inject_recurrent
from ulysses_infer.model.sampling.head import ShardedHead
from ulysses_infer.parallel.layout import Layout, Place

logger = logging.getLogger(__name__)


class Injection:
    """An injected model, its mode-aware layers, and its replicated linears.

    `model` may still be on the meta device: the checkpoint loader later fills the `slices` that this rank keeps.
    """

    def __init__(self, model: Any, layout: Layout, shard: int, expert_placement: str = "replicate") -> None:
        self.model, self.layout = model, layout
        self.expert_placement, self.expert_layers = expert_placement, list[ExpertLayer]()
        self.base = layout.place(layout.base, shard)
        self.config = model.config.get_text_config(decoder=True)
        self.replicated_linears: list[str] = []
        attention.register()
        experts.register()
        self.config._attn_implementation = ATTENTION_NAME
        self.config._experts_implementation = EXPERTS_NAME
        self.local_config = copy.copy(self.config)
        # Only the language model of a multimodal model is served and sharded.
        self.decoder = model if self.config is model.config else model.get_decoder()
        adapt(self.decoder)
        self.recurrent_layers = inject_recurrent(self.decoder, self._name_of(self.decoder), layout, self.base)
        recurrent = [layer.module for layer in self.recurrent_layers]
        injector = AttentionInjector(self.decoder, self.config, self.local_config, layout, self.base, recurrent)
        self.attention_layers, self.mode_aware_layers = injector.layers, injector.mode_aware_layers
        for layer in self.recurrent_layers:
            self.mode_aware_layers += [layer, *layer.linears]
        self._own_slices = {name: kept for layer in self.recurrent_layers for name, kept in layer.slices.items()}
        self._inject_experts()
        self._inject_mlps()
        self.head_name, self.head = self._inject_head()
        self._log_replicated_linears()
        self.mode_aware_layers += replace_whole(model, self.base).values()

    def bind(self, place: Place) -> None:
        """Switch every mode-aware layer to `place`. Called when the mode changes."""
        for layer in self.mode_aware_layers:
            layer.bind(place)

    def forget_views(self) -> None:
        """Let the layers make their views again. Call it after weights have changed address."""
        for layer in self.mode_aware_layers:
            if isinstance(layer, KeepsViews):
                layer.forget_views()

    def slices(self, name: str) -> tuple[int, list[Any]] | None:
        """The part of the full parameter `name` that this rank keeps: (dimension, spans), or None for all of it."""
        if name in self._own_slices:
            return self._own_slices[name]
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        if isinstance(owner, ShiftLinear | QuantizedLinear | ShardedHead):
            return owner.slices(leaf)
        experts = getattr(owner, "expert_layer", None)
        return experts.slices(leaf) if experts is not None else None

    def is_inside_recurrent_layer(self, name: str) -> bool:
        """Whether the parameter `name` belongs to the inner part of a recurrent layer."""
        return name in self._own_slices

    def _name_of(self, wanted: nn.Module) -> str:
        return next(name for name, module in self.model.named_modules() if module is wanted)

    # -- feed-forward ------------------------------------------------------------------------------------------

    def _inject_experts(self) -> None:
        for name, module in list(self.decoder.named_modules()):
            if scales_inputs(module):
                self.decoder.set_submodule(name, ScaledInputExperts(module))
        for module in self.decoder.modules():
            if is_experts(module):
                untyped = cast(Any, module)
                if getattr(untyped, "has_post_expert_norm", False):
                    raise UnsupportedModelError(f"{type(module).__name__} normalises each expert's output")
                layer = ExpertLayer(module, self.expert_placement, self.layout, self.base.shard)
                untyped.expert_layer = layer
                untyped.config = self.config
                _shrink_to_slice(module, layer)
                self.mode_aware_layers.append(layer)
                self.expert_layers.append(layer)

    def _inject_mlps(self) -> None:
        attention_modules = {*self.attention_layers, *(layer.module for layer in self.recurrent_layers)}
        for module in list(self.decoder.modules()):
            if module in attention_modules:
                continue
            adapted: Mapping[str, MlpRule] = getattr(module, "feed_forward_rules", {})
            if adapted or _is_plain_mlp(module, self.layout.world_size):
                rules = adapted or MLP_RULES
                for child, linear in _linear_children(module).items():
                    if child in rules:
                        cut, rule = rules[child]
                        sharding = rule(cut_features(linear, cut))
                        self._replace(module, child, shift_linear(linear, cut, sharding, self.base))
                self._inject_sparsity(module)

    def _inject_sparsity(self, module: nn.Module) -> None:
        """Let a feed-forward block with sparse activations (gemma3n) take its cutoff from all neurons."""
        untyped = cast(Any, module)
        sparsity = getattr(module, "activation_sparsity", 0.0)
        if hasattr(module, "_gaussian_topk") and sparsity > 0.0:
            untyped._gaussian_topk = ShardedTopK(sparsity, untyped.intermediate_size)  # overrides the method
            self.mode_aware_layers.append(untyped._gaussian_topk)

    # -- head --------------------------------------------------------------------------------------------------

    def _inject_head(self) -> tuple[str, ShardedHead]:
        head = self.model.get_output_embeddings() or self._inner_head()
        name = next((name for name, module in self.model.named_modules() if module is head), None)
        if name is None or not isinstance(head, nn.Linear):
            raise UnsupportedModelError(f"{type(self.model).__name__} has no linear vocabulary head")
        embedding = self.model.get_input_embeddings()
        tied = any(getattr(config, "tie_word_embeddings", False) for config in (self.config, self.model.config))
        self.head_vocab_size = getattr(self.config, "unpadded_vocab_size", None) or head.out_features
        sharded = ShardedHead(head, self.base, embedding if tied else None, self.head_vocab_size)
        owner, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(owner), leaf, sharded)
        self.mode_aware_layers.append(sharded)
        return name, sharded

    def _inner_head(self) -> nn.Module | None:
        """The head of a language model inside the model."""
        inner: Any = getattr(self.model, "language_model", None)
        head: nn.Module | None = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        return head

    def _replace(self, parent: nn.Module, child: str, replacement: nn.Module) -> None:
        setattr(parent, child, replacement)
        self.mode_aware_layers.append(cast(ModeAware, replacement))

    def _log_replicated_linears(self) -> None:
        """Record and log the linear layers that every rank computes in full."""
        self.replicated_linears = sorted(
            {_layer_name_pattern(name) for name, module in self.model.named_modules() if is_linear(module)}
        )
        if self.replicated_linears:
            logger.info("replicated on every rank: %s", ", ".join(self.replicated_linears))
        for name, module in self.decoder.named_modules():
            if isinstance(module, nn.Embedding) and name.endswith("_per_layer"):
                size = module.weight.numel() * module.weight.element_size() / (1 << 30)
                logger.info("replicated on every rank: %s, %.2f GiB", name, size)


def _shrink_to_slice(module: nn.Module, layer: ExpertLayer) -> None:
    """Replace the full expert weights, still on the meta device, by ones of the stored slice's shape."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        kept = layer.slices(name)
        shape = list(parameter.shape)
        if kept is not None:
            shape[kept[0]] = sum(span.size for span in kept[1])
        setattr(module, name, nn.Parameter(parameter.new_empty(shape), requires_grad=False))


def _linear_children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if is_linear(child)}


def _is_plain_mlp(module: nn.Module, world_size: int) -> bool:
    """Whether all weights are known linears: column-parallel ones, then one row-parallel one of matching width.

    Not if there are fewer neurons than ranks: then every rank computes the block in full.
    """
    found = _linear_children(module)
    columns = [name for name in found if MLP_RULES.get(name, ("",))[0] == "column"]
    rows = [name for name in found if MLP_RULES.get(name, ("",))[0] == "row"]
    if not columns or len(rows) != 1:
        return False
    width = cut_features(found[rows[0]], "row")
    if width < world_size:
        return False
    packed = len(columns) == 1 and columns[0] in PACKED_MLP_INPUTS
    widths_agree = all(cut_features(found[name], "column") == (2 * width if packed else width) for name in columns)
    return widths_agree and not _has_stray_weights(module, set(columns + rows))


def _has_stray_weights(module: nn.Module, covered: set[str]) -> bool:
    """Whether there are weights between the projections (an inner norm, a learned activation), which would see only a
    part of the width.

    The norms and attention of a decoder layer that holds its linears directly (opt) act on the residual stream and do
    not count.
    """
    if any(True for _ in module.parameters(recurse=False)):
        return True
    is_layer = any(hasattr(child, "layer_idx") for child in module.children())
    others = [child for name, child in module.named_children() if name not in covered]
    return not is_layer and any(any(True for _ in child.parameters()) for child in others)


def _layer_name_pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
