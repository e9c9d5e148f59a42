"""The probe: a dry run that refuses models in which tokens influence each other outside of attention.

Attention is replaced by a stub in which each token sees only itself. A token's logits must then not depend on its
neighbours or its index in the batch. They would with a recurrent state, a convolution, positions counted from the
batch, or attention that bypasses our attention function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions
from ulysses_infer.cache.paged import CacheShape
from ulysses_infer.cache.states import StateCache, StateSequences, StateShape
from ulysses_infer.errors import UnsupportedModelError, first_line
from ulysses_infer.model.context import StepContext
from ulysses_infer.model.injection.attention import COMPRESSED_KINDS
from ulysses_infer.parallel.collectives import Collectives
from ulysses_infer.parallel.layout import Layout, Span

TRIALS = ((3, 5, 7), (11, 13, 17), (19, 23, 29))  # token ids; rounding may flip an expert in one trial, not in all
TOKENS = 2  # per trial
WINDOW_KINDS = COMPRESSED_KINDS | {"sliding_attention", "hybrid_sliding"}
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}  # of the largest logit


class ProbeCache:
    """Stub of the paged cache: holds the keys and values of one step and records which layers wrote and read."""

    def __init__(self, shape: CacheShape, device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._sources = dict(shape.sources)
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.index_keys: dict[int, torch.Tensor] = {}
        self.readers: list[int] = []

    @classmethod
    def of(cls, model: Any) -> ProbeCache:
        """For a `ShiftModel`."""
        base, layout = model.injection.base, model.injection.layout
        return cls(model.shape.cache_shape(base.shard, layout, 1, model.dtype), next(model.module.parameters()).device)

    def rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PagedCache.rows`."""
        shape = self._shape.layers[layer]
        assert shape is not None
        self.keys[layer], self.values[layer] = (
            torch.empty(TOKENS, shape.num_key_value_heads, width, dtype=self._shape.dtype, device=self._device)
            for width in (shape.key_width, shape.value_width)
        )
        return self.keys[layer], self.values[layer]

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """key: [T, Hkv, d]; value: [T, Hkv, dv]."""
        self.keys[layer], self.values[layer] = key, value

    def write_index(self, layer: int, slots: torch.Tensor, key: torch.Tensor) -> None:
        """key: [T, width]. The probe's sequences are too short for a selection."""
        self.index_keys[layer] = key[:, None, None]

    def write_entries(self, layer: int, name: str, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """rows: [n, width]. The probe's sequences are too short for an entry of several tokens."""

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PagedCache.of_layer`."""
        self.readers.append(layer)
        source = self._sources.get(layer, layer)
        return self.keys[source], self.values[source]


class ProbeAttention:
    """Stub of attention: each token sees only itself. Key and query are mixed in, so that positions have an effect."""

    name = "probe"

    def __init__(self) -> None:
        self.options: list[AttentionOptions] = []

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """query: [T, Hq, d]; keys, values: [T, Hkv, d | dv]; returns [T, Hq, dv]."""
        self.options.append(options)
        groups = query.shape[1] // keys.shape[1]
        own = (values + keys[..., :1]).repeat_interleave(groups, dim=1)
        return own + query[..., :1]


def probe(model: Any) -> None:
    """Run `model` (a `ShiftModel`) on two tokens a few times, on this rank alone.

    Raises `UnsupportedModelError` with the model type and the problem.
    """
    name = model.injection.config.model_type
    try:
        problem = _first_problem(model)
    except (TypeError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(
            f"model type {name!r} does not run with sharded heads: {type(error).__name__}: {first_line(error)}"
        ) from error
    if problem:
        raise UnsupportedModelError(f"model type {name!r} is not supported: {problem}")


def _first_problem(model: Any) -> str | None:
    cache, attention = ProbeCache.of(model), ProbeAttention()
    layout, shard = model.injection.layout, model.injection.base.shard
    context = trial_context(layout, shard, cache, attention, _device_of(model), model.state_shapes)
    _logits(model, context, [1, 2], [0, 1])
    by_layer = dict(zip(cache.readers, attention.options, strict=True))
    model.attention_options = [by_layer.get(layer) for layer in range(model.shape.num_layers)]
    return (
        _check_layers(model, cache)
        or _check_heads(model, layout, shard, cache)
        or _check_windows(model)
        or _check_token_isolation(model, context)
    )


def trial_context(
    layout: Layout,
    shard: int,
    cache: Any,
    attention: ProbeAttention,
    device: torch.device | str = "cpu",
    state_shapes: Sequence[StateShape] = (),
) -> StepContext:
    """A full-TP context of two tokens without all-reduces, for one rank alone. Each token is a sequence of its own.

    Its results are meaningless but comparable.
    """
    slots = torch.arange(2, device=device)
    metadata = AttentionMetadata(slots, [1, 1], [1, 1], slots[:, None])
    collectives = Collectives(layout.place(layout.shift, shard), None, None)
    states = StateCache(state_shapes, TOKENS, torch.device(device)) if state_shapes else None
    sequences = StateSequences(slots, [1, 1])
    return StepContext(collectives, [Span(0, 2)], [2], metadata, cache, attention, states=states, sequences=sequences)


def clear_states(context: StepContext) -> None:
    """Let the sequences of a trial context start anew."""
    if context.states is not None:
        assert context.sequences is not None
        context.states.clear(context.sequences.slots)


def _device_of(model: Any) -> torch.device:
    device: torch.device = next(model.module.parameters()).device
    return device


def _check_layers(model: Any, cache: ProbeCache) -> str | None:
    expected = [layer for layer, heads in enumerate(model.shape.layers) if heads is not None]
    if sorted(cache.readers) == expected:
        return None
    return f"layers {expected} have attention, but attention ran on layers {cache.readers} in one step"


def _check_heads(model: Any, layout: Layout, shard: int, cache: ProbeCache) -> str | None:
    for layer, heads in enumerate(model.shape.layers):
        if heads is None or heads.source is not None:
            continue
        found = (*cache.keys[layer].shape[1:], cache.values[layer].shape[2])
        expected = (heads.cached_by(shard, layout), heads.key_width, heads.value_width)
        if found != expected:
            return f"layer {layer} has key/value heads of {found} (number, widths), its config says {expected}"
    return None


def _check_windows(model: Any) -> str | None:
    kinds = getattr(model.injection.config, "layer_types", None)
    for layer, options in enumerate(model.attention_options):
        if options is None:
            continue
        if kinds and (kinds[layer] in WINDOW_KINDS) != (options.sliding_window is not None):
            return f"layer {layer} is of type {kinds[layer]}, but uses a window of {options.sliding_window}"
        source = model.shape.layers[layer].source
        if source is not None and model.attention_options[source].span != options.span:
            return f"layer {layer} reads the cache of layer {source}, which has another attention span"
    return None


def _check_token_isolation(model: Any, context: StepContext) -> str | None:
    """A problem found in every trial. A rank with an empty part of the vocabulary has no logits to compare, and tensors
    on device `meta` have no values."""
    found = None
    if not model.vocabulary.size or next(model.module.parameters()).is_meta:
        return None
    for tokens in TRIALS:
        found = _token_isolation_problem(model, context, [token % model.shape.vocab_size for token in tokens])
        if found is None:
            return None
    return found


def _token_isolation_problem(model: Any, context: StepContext, tokens: list[int]) -> str | None:
    """Compare the logits of one token at one position, for two neighbours and both indices in the batch."""
    other, token, another = tokens
    expected = _logits(model, context, [other, token], [1, 3])[1]
    margin = TOLERANCE[model.dtype] * expected.abs().max()
    if (_logits(model, context, [another, token], [2, 3])[1] - expected).abs().max() > margin:
        return "tokens influence each other outside of attention (a recurrent state, a convolution, custom attention)"
    if (_logits(model, context, [token, other], [3, 1])[0] - expected).abs().max() > margin:
        return "it takes a token's position from its index in the batch instead of position_ids"
    return None


def _logits(model: Any, context: StepContext, tokens: list[int], positions: list[int]) -> torch.Tensor:
    device = _device_of(model)
    rows = torch.arange(2, device=device)
    clear_states(context)
    logits = model.forward(torch.tensor(tokens, device=device), torch.tensor(positions, device=device), rows, context)
    result: torch.Tensor = logits.float()
    return result
