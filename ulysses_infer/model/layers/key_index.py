"""The index of an attention layer (learned sparse attention, DSA): which cached keys each token attends to.

The modeling code of the index is transformers' own, which differs from family to family: where its queries come from,
norms, rotary parts, the order of scaling. It runs on stand-ins for the cached keys and for their scores, which record
the query, the weights and the number of keys to select. The keys are then scored where they are cached.

Parallelism. All heads of an index see one key per token, so its keys are replicated: every rank caches those of all
tokens, in every mode. A rank scores keys for the tokens of its own slice, with all index heads, whatever the mode; the
ranks of a TP group compute the same from the same inputs. Neither depends on how attention heads are sharded. Under
sequence parallelism two all-gathers per index exchange the step's keys and the selected slots. Sharding the keys by
heads is impossible with one head. Sharding them by position would save memory (128 of 704 numbers per token and layer
in DeepSeek-V3.2), but every rank would then score all tokens and exchange candidates in every step of every mode.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ulysses_infer.attention.index import IndexQueries, Selection, needs_selection, selected, top_slots
from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.context import StepContext, step_context

EVERYTHING = 1 << 31  # more keys than any cache has


class NoMask:
    """Stands for the attention mask where modeling code slices it. Attention over a paged cache needs none."""

    dtype = torch.bool

    def __getitem__(self, _: Any) -> NoMask:
        return self

    def __invert__(self) -> NoMask:
        return self

    def __and__(self, other: Any) -> Any:
        """Of a mask and what an index selects."""
        return other


def attach_index(attention: nn.Module, child: str, layer: int) -> int:
    """Let the index of an attention module, its `child`, select cached keys. Returns the width of its keys.

    Its weights keep their names.
    """
    indexer: Any = attention.get_submodule(child)
    attention.register_forward_pre_hook(_give_no_mask, with_kwargs=True)
    if hasattr(indexer, "pool_keys"):  # made by an adapter, see `pooled_keys.py`
        return int(indexer.cached_width)
    if not hasattr(indexer, "head_dim"):
        raise UnsupportedModelError(f"{type(indexer).__name__} is an index of a kind that is not supported")
    indexer.forward = LayerIndex(indexer, layer)  # the instance attribute overrides the method
    return int(indexer.head_dim)


def _give_no_mask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "attention_mask": NoMask()} if kwargs.get("attention_mask") is None else kwargs


class LayerIndex:
    """The index of one layer. It is called in place of the forward of transformers' module."""

    def __init__(self, indexer: nn.Module, layer: int) -> None:
        self._forward: Callable[..., Any] = indexer.forward
        self._kind, self._layer = type(indexer).__name__, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Selection:
        """The arguments are those of the module. Stores the step's keys, then selects for every token of the step."""
        recorder = _Recorder(self._kind)
        self._forward(*args, **{**kwargs, "past_key_values": recorder})
        return select(step_context(), self._layer, *recorder.recorded())


def select(context: StepContext, layer: int, queries: IndexQueries, key: torch.Tensor) -> Selection:
    """Store the step's keys and select. queries: of this rank's tokens; key: [t, d]."""
    slots, count = context.attention_of(layer).slots, context.num_local_tokens
    context.cache.write_index(layer, slots, of_all_tokens(context, key[:count]))
    return best_keys(context, layer, IndexQueries(queries.query[:count], queries.weights[:count], queries.top_k))


def best_keys(context: StepContext, layer: int, queries: IndexQueries) -> Selection:
    """What every token of the step attends to, once its keys are cached. queries: of this rank's tokens."""
    metadata = context.attention_of(layer)
    if not needs_selection(metadata, queries.top_k, queries.pool):
        return Selection()
    rows = context.token_spans[context.collectives.place.token_index]
    found = top_slots(queries, context.cache.index_keys[layer], metadata, rows)
    return Selection(selected(of_all_tokens(context, found), metadata, queries.pool))


def of_all_tokens(context: StepContext, rows: torch.Tensor) -> torch.Tensor:
    """rows: [t, n], of this rank's tokens; returns [T, n]."""
    return context.collectives.gather_rows(rows, [span.size for span in context.token_spans])


class _Recorder:
    """Stands for the cache, then for the keys in it, then for their scores, while modeling code runs."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._key: torch.Tensor | None = None
        self._query: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None
        self._scale, self._is_rectified, self._top_k = 1.0, False, 0

    def recorded(self) -> tuple[IndexQueries, torch.Tensor]:
        """Queries, weights and top-k; and the step's keys, [t, d]."""
        if self._key is None or self._query is None or self._weights is None or not self._top_k:
            raise self._unsupported("not scored as expected")
        query, weights = self._query[0].to(self._key.dtype), self._weights[0, :, 0] * self._scale
        return IndexQueries(query, weights.contiguous(), self._top_k), self._key[0]

    # -- the cache ---------------------------------------------------------------------------------------------

    def update_indexer(self, key: torch.Tensor, layer: int) -> _Recorder:
        """Where modeling code stores the step's keys, [1, t, d], and gets all of the sequence."""
        self._key = key
        return self

    # -- keys and scores ---------------------------------------------------------------------------------------

    shape = (EVERYTHING,)

    def transpose(self, *_: int) -> _Recorder:
        """Of the keys, for the product."""
        return self

    unsqueeze = squeeze = transpose

    def float(self) -> _Recorder:
        """Of the keys."""
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Recorder:
        """Called for torch's functions of scores."""
        made: _Recorder = next(argument for argument in args if isinstance(argument, cls))
        if function is torch.matmul and made._query is None:
            made._query = args[0]  # [1, t, H, d]
        elif function is torch.nn.functional.relu:
            made._is_rectified = True
        elif function is torch.matmul and made._is_rectified:
            made._weights = args[0]  # [1, t, 1, H]
        else:
            raise made._unsupported(f"given to {function.__name__}")
        return made

    def __mul__(self, factor: Any) -> _Recorder:
        if not isinstance(factor, float) or factor <= 0.0 or self._is_rectified:
            raise self._unsupported("multiplied by what is not a positive constant")
        self._scale *= factor  # relu lets positive factors through
        return self

    def masked_fill(self, mask: Any, _: Any) -> _Recorder:
        """Causality, which the cache knows."""
        if not isinstance(mask, NoMask):
            raise self._unsupported("masked")
        return self

    def topk(self, count: int, dim: int = -1) -> Any:
        """The last operation on the scores."""
        self._top_k = count
        return SimpleNamespace(indices=torch.empty(0))

    def _unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"the scores of {self._kind} are {what}, which is not supported")
