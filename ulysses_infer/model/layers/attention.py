"""The attention function that transformers' models call: all-to-all, cache write, attention, all-to-all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions
from ulysses_infer.attention.index import Selection
from ulysses_infer.cache.paged import CacheScales
from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.kernels.placement import HeadTarget, PlaceHeads
from ulysses_infer.model.context import StepContext, step_context, step_positions
from ulysses_infer.model.layers.head_plan import HeadPlan
from ulysses_infer.model.layers.key_index import NoMask

ATTENTION_NAME = "ulysses_infer"
Prepare = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, AttentionOptions],
    tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionOptions],
]
"""Makes query, key, value and options of attention from what the exchange brought: all tokens, own heads, [T, h, d]."""
# Further arguments that models pass. Any other one might change the result and is refused.
KNOWN_EXTRAS = frozenset(
    (
        "sliding_window",
        "position_ids",
        "input_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "logits_to_keep",
        "return_dict",
    )
)


def shift_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Selection | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
    indices: Selection | None = None,
    prepare: Prepare | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer in any mode (arXiv 2509.16495 §3.1), with the signature of `AttentionInterface`.

    query: [1, Hq/tp, t, d]; key, value: [1, max(1, Hkv/tp), t, d | dv], or a latent (`LatentAttention.join`); returns
    ([1, t, Hq/tp, dv], None). s_aux, alibi: [Hq], a sink and a slope of each head of the whole layer. attention_mask:
    only what an index has selected.
    prepare: called after the exchange, before which heads may be wider.
    """
    if isinstance(attention_mask, Selection):
        attention_mask, indices = None, attention_mask
    if attention_mask is not None and not isinstance(attention_mask, NoMask):
        raise UnsupportedModelError(f"{type(module).__name__} builds its own attention mask, which is not supported")
    plan = module.head_plan
    if plan.latent is not None:
        plan.latent.check(key, value)
    options = _options(module, plan, query.shape[-1], scaling, softcap, s_aux, alibi, kwargs)
    if plan.temperature is not None:
        query = plan.temperature.scaled(query, step_positions())
    tokens = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    selected = None if indices is None else indices.metadata
    return attend_tokens(module.layer_idx, plan, *tokens, options, selected, prepare)[None], None


def attend_tokens(
    layer: int,
    plan: HeadPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: AttentionOptions,
    selected: AttentionMetadata | None = None,
    prepare: Prepare | None = None,
) -> torch.Tensor:
    """Attention of `layer` in the mode of the step, in token-major layout.

    query: [t, Hq/tp, d]; key, value: [t, max(1, Hkv/tp), d | dv]; returns [t, Hq/tp, dv]. selected: the keys that an
    index has selected, see `Selection`. prepare: see `shift_attention`.
    """
    context = step_context()
    if plan.source is not None:
        return _attend_shared(context, layer, plan, query, options, selected)
    if context.collectives.place.mode.sp == 1:
        query, key, value = plan.arranged(query, key, value)
        if prepare is not None:
            query, key, value, options = prepare(query, key, value, options)
        return plan.restored(_attend(context, layer, plan, query, key, value, options, selected))
    count = context.num_local_tokens
    query, key, value = _tokens_to_heads(context, plan, query[:count], key[:count], value[:count])
    if prepare is not None:
        query, key, value, options = prepare(query, key, value, options)
    return plan.restored(_heads_to_tokens(context, _attend(context, layer, plan, query, key, value, options, selected)))


def attend_placed(
    layer: int, plan: HeadPlan, place: PlaceHeads, like: torch.Tensor, width: int, options: AttentionOptions
) -> torch.Tensor:
    """`attend_tokens` for heads that `place` writes to where the mode needs them: the cache, or the all-to-all's input.

    like: [t, ...], gives the number of tokens, dtype and device. width: of every head. Returns [t, Hq/tp, width].
    """
    context = step_context()
    if context.collectives.place.mode.sp == 1:
        query = _place_into_cache(context, layer, plan, place, like, width)
        return plan.restored(_attend_cached(context, layer, plan, query, options))
    query, key, value = _place_and_exchange(context, plan, place, like, width)
    return plan.restored(_heads_to_tokens(context, _attend(context, layer, plan, query, key, value, options)))


def cache_ahead(layer: int, plan: HeadPlan, key: torch.Tensor, value: torch.Tensor) -> None:
    """Cache the keys and values of `layer` for all tokens of the step, ahead of its `attend_cached_ahead`.

    key, value: [t, Hkv/tp, d], of this rank's tokens.
    """
    context = step_context()
    key, value = plan.arranged_key_values(key, value)
    if context.collectives.place.mode.sp > 1:
        own = key[: context.num_local_tokens], value[: context.num_local_tokens]
        key, value = context.collectives.tokens_to_heads(own, context.token_spans)
    _write(context, layer, plan, key, value)


def attend_cached_ahead(layer: int, plan: HeadPlan, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """Attention to keys and values that are in the cache already. query: [t, Hq/tp, d]; returns [t, Hq/tp, dv]."""
    return _attend_shared(step_context(), layer, plan, query, options, None)


def _attend_shared(
    context: StepContext,
    layer: int,
    plan: HeadPlan,
    query: torch.Tensor,
    options: AttentionOptions,
    selected: AttentionMetadata | None,
) -> torch.Tensor:
    """Attention of a layer that reads another layer's cache: only its queries are exchanged, and nothing is written."""
    if context.collectives.place.mode.sp == 1:
        (query,) = plan.arranged(query)
        return plan.restored(_attend_cached(context, layer, plan, query, options, selected))
    own = plan.arranged(query[: context.num_local_tokens])
    (query,) = context.collectives.tokens_to_heads(own, context.token_spans)
    return plan.restored(_heads_to_tokens(context, _attend_cached(context, layer, plan, query, options, selected)))


def _place_into_cache(
    context: StepContext, layer: int, plan: HeadPlan, place: PlaceHeads, like: torch.Tensor, width: int
) -> torch.Tensor:
    """Full TP: keys and values go to the cache. Returns the query, [t, Hq/W, width]."""
    query = like.new_empty(like.shape[0], plan.shard_attention_heads, width)
    keys, values = context.cache.rows(layer)
    slots, scales = context.attention_of(layer).slots, plan.cache_scales or CacheScales()
    target = HeadTarget(query[:, None], keys[:, None], values[:, None], slots, scales.key, scales.value)
    place(target, plan.query_index(like.device), plan.key_value_index(like.device))
    return query


def _place_and_exchange(
    context: StepContext, plan: HeadPlan, place: PlaceHeads, like: torch.Tensor, width: int
) -> tuple[torch.Tensor, ...]:
    """SP: heads go to the packed input of the all-to-all. Returns q, k, v of all tokens, each [T, h, d]."""
    heads = [plan.shard_attention_heads, *[plan.shard_key_value_heads] * 2]
    sizes = (context.collectives.place.mode.sp, context.num_local_tokens, sum(heads), width)
    packed = like.new_empty(sizes).transpose(0, 1)
    target = HeadTarget(*packed.split(heads, dim=2))
    place(target, plan.query_index(like.device), plan.key_value_index(like.device))
    (received,) = context.collectives.tokens_to_heads((packed.flatten(2),), context.token_spans)
    query, key, value = received.unflatten(-1, (-1, width)).squeeze(1).split(heads, dim=1)
    return query, key, value


def _heads_to_tokens(context: StepContext, output: torch.Tensor) -> torch.Tensor:
    """output: [T, Hq/W, dv]; returns [t, Hq/tp, dv]."""
    back = context.collectives.heads_to_tokens(output.flatten(1), context.token_spans)
    if back.shape[0] == 0:  # an empty slice runs a dummy token, whose output is unused
        back = back.new_zeros(1, back.shape[1])
    return back.unflatten(1, (-1, output.shape[-1]))


def _attend(
    context: StepContext,
    layer: int,
    plan: HeadPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: AttentionOptions,
    selected: AttentionMetadata | None = None,
) -> torch.Tensor:
    """Write the cache, then attend: all tokens, local heads. query: [T, Hq/W, d]; returns [T, Hq/W, dv]."""
    _write(context, layer, plan, key, value)
    return _attend_cached(context, layer, plan, query, options, selected)


def _write(context: StepContext, layer: int, plan: HeadPlan, key: torch.Tensor, value: torch.Tensor) -> None:
    """key, value: [T, Hkv, d | dv], local heads of all tokens."""
    scales = plan.cache_scales
    if scales is not None:
        key, value = key / scales.key, value / scales.value
    context.cache.write(layer, context.attention_of(layer).slots, key, value)


def _attend_cached(
    context: StepContext,
    layer: int,
    plan: HeadPlan,
    query: torch.Tensor,
    options: AttentionOptions,
    selected: AttentionMetadata | None = None,
) -> torch.Tensor:
    """Attention over the cache, after its write. query: [T, Hq/W, d]; returns [T, Hq/W, dv]."""
    cached = context.cache.of_layer(layer)
    metadata, scales = context.attention_of(layer), plan.cache_scales
    if selected is not None:
        cached, metadata = context.cache.slots_of_layer(layer), selected
        options = replace(options, sliding_window=None, chunk_size=None)  # what is selected is seen
    if scales is not None:
        # The backend reads the quantized cache: fold the key scale into the scores, the value scale into the output.
        options = replace(options, scaling=options.scaling * scales.key)
    if plan.latent is None:
        output = context.backend.attend(query, *cached, metadata, options)
    else:
        output = plan.latent.attend(query, *cached, context.backend, metadata, options)
    return output if scales is None else output * scales.value


def _tokens_to_heads(
    context: StepContext, plan: HeadPlan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One fused all-to-all for q, k and v: from [t, heads/tp, d], this rank's tokens, to [T, heads/W, d], its heads."""
    if plan.values_are_keys:
        query, key = context.collectives.tokens_to_heads(plan.arranged(query, key), context.token_spans)
        return query, key, key[..., : value.shape[-1]]
    query, key, value = context.collectives.tokens_to_heads(plan.arranged(query, key, value), context.token_spans)
    return query, key, value


def _options(
    module: Any,
    plan: HeadPlan,
    width: int,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    alibi: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> AttentionOptions:
    unknown = [name for name, value in kwargs.items() if value is not None and name not in KNOWN_EXTRAS]
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes unsupported attention arguments: {', '.join(unknown)}"
        )
    return AttentionOptions(
        scaling=width**-0.5 if scaling is None else scaling,
        sliding_window=kwargs.get("sliding_window"),
        chunk_size=module.attention_chunk_size,
        softcap=softcap,
        sinks=None if sinks is None else plan.of_shard(sinks),
        alibi=None if alibi is None else plan.of_shard(alibi),
    )


def register() -> None:
    """Register `shift_attention` with transformers as `ATTENTION_NAME`.

    No mask function is registered, so transformers builds no masks.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, shift_attention)
