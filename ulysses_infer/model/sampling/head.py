"""The sharded output head: every rank computes its rows of the vocabulary in every mode."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.model.context import step_context
from ulysses_infer.model.layers.matmul import linear
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.quantization.scheme import MARK
from ulysses_infer.native.function import ELEMENTWISE, NativeFunction, native_function
from ulysses_infer.parallel.layout import Mode, Place, Span, even_span
from ulysses_infer.parallel.sharding import Part, Sharding


class ShardedHead(nn.Module):
    """This rank's rows of the output embedding, the same in every mode.

    A tied head is a view of the replicated input embedding and takes no memory. One that is quantised while loading has
    a copy of its own, in `stored`.
    """

    def __init__(
        self, source: nn.Linear, place: Place, tied_to: nn.Embedding | None, vocab_size: int | None = None
    ) -> None:
        """vocab_size: the rows of `source` that are tokens, the first ones; None: all."""
        super().__init__()
        self.vocabulary = even_span(vocab_size or source.out_features, place.shard, place.world_size)
        self._tied_to = [tied_to]  # in a list, so that it is not registered as a child and loaded twice
        self._dtype = source.weight.dtype
        self.stored: QuantizedLinear | None = None
        if hasattr(source, MARK):
            self.stored = _quantised(source, place, vocab_size or source.out_features)
        elif tied_to is None:
            shape = (self.vocabulary.size, source.in_features)
            self.weight = nn.Parameter(source.weight.new_empty(shape), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if source.bias is not None:
            self.bias = nn.Parameter(source.bias.new_empty(self.vocabulary.size), requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        # Mamba reads the type of its head's weight, which a tied or quantised head has not registered.
        if name == "weight" and self.stored is not None:
            return torch.empty(0, dtype=self._dtype)
        is_tied = name == "weight" and vars(self)["_tied_to"] != [None]
        return self.rows() if is_tied else super().__getattr__(name)

    def slices(self, name: str) -> tuple[int, list[Span]] | None:
        """The part of the full parameter `name` that this rank keeps: (dimension, spans)."""
        return 0, [self.vocabulary]

    def bind(self, place: Place) -> None:
        """The rows are the same in every mode; a quantised head makes its view of them."""
        if self.stored is not None:
            self.stored.bind(self.stored.base)

    def forget_views(self) -> None:
        """See `ShiftLinear.forget_views`."""
        if self.stored is not None:
            self.stored.forget_views()

    def multiply(self, states: torch.Tensor) -> torch.Tensor:
        """states: [n, D]; returns their logits in this rank's part of the vocabulary, [n, V/W]."""
        if self.stored is None:
            return linear(states, self.rows(), self.bias)
        logits: torch.Tensor = self.stored(states)
        return logits if self.bias is None else logits.add_(self.bias)

    def rows(self) -> torch.Tensor:
        """[V/W, D], this rank's rows of the output embedding, if it is not quantised."""
        (tied_to,) = self._tied_to
        if tied_to is None:
            return self.get_parameter("weight")
        return tied_to.weight[self.vocabulary.start : self.vocabulary.stop]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [1, n_mine, D], rows of this rank's token slice; returns [1, n, V/W], all rows, local vocabulary.

        The model may also give it the whole slice.
        """
        context = step_context()
        rows, wanted = hidden[0], context.logits_rows
        if wanted is not None and wanted.shape[0] != rows.shape[0]:
            rows = rows.index_select(0, wanted)
        gathered = context.collectives.gather_rows(rows, context.logits_counts)
        if context.head_inputs is not None:
            context.head_inputs.append(gathered)
        return self.multiply(gathered)[None]


def _quantised(source: nn.Linear, place: Place, vocab_size: int) -> QuantizedLinear:
    """The rows of `place` among all ranks, whatever the mode; without the bias, which is not quantised."""
    dense = nn.Linear(source.in_features, source.out_features, bias=False, device="meta", dtype=source.weight.dtype)
    split = Place(Mode(1, place.world_size), place.shard, place.world_size)
    return QuantizedLinear(dense, getattr(source, MARK), "column", Sharding((Part(vocab_size),)), split)


def local_argmax(logits: torch.Tensor, vocabulary: Span) -> torch.Tensor:
    """The largest logit and its token id in the local vocabulary, for each row.

    logits: [n, V/W]; returns [n, 2] float64, which holds any id exactly: value, token id. The value is minus infinity
    on a rank with an empty vocabulary part (more ranks than tokens).
    """
    if not vocabulary.size:
        empty = logits.new_tensor([-torch.inf, vocabulary.start], dtype=torch.float64)
        return empty.repeat(len(logits), 1)
    native = _native_local_argmax(logits.dtype) if logits.device.type == "cpu" else None
    if native is not None and logits.stride(-1) == 1:
        pairs = torch.empty(len(logits), 2, dtype=torch.float64)
        native(pairs.data_ptr(), logits.data_ptr(), len(logits), vocabulary.size, logits.stride(0), vocabulary.start)
        return pairs
    values, ids = logits.max(dim=-1)
    return torch.stack([values.double(), (ids + vocabulary.start).double()], dim=-1)


@functools.cache
def _native_local_argmax(dtype: torch.dtype) -> NativeFunction | None:
    """The native version of `local_argmax` for `dtype`, on a CPU."""
    suffix = {torch.bfloat16: "bf16", torch.float32: "f32"}.get(dtype)
    return None if suffix is None else native_function("elementwise", f"best_of_rows_{suffix}", "ppiiii", ELEMENTWISE)


def global_argmax(pairs: torch.Tensor) -> torch.Tensor:
    """Greedy tokens from every rank's `local_argmax`; ties go to the lowest id, and NaN counts as the largest.

    pairs: [W, n, 2]; returns [n] int64.
    """
    native = _native_global_argmax() if pairs.device.type == "cpu" else None
    if native is not None:
        tokens = torch.empty(pairs.shape[1], dtype=torch.int64)
        native(tokens.data_ptr(), pairs.data_ptr(), *pairs.shape[:2])
        return tokens
    return global_argmax_torch(pairs)


def global_argmax_torch(pairs: torch.Tensor) -> torch.Tensor:
    """`global_argmax` in torch, on any device."""
    values, ids = pairs.unbind(-1)
    is_best = (values == values.amax(dim=0)) | values.isnan()
    return torch.where(is_best, ids, torch.inf).amin(dim=0).long()


@functools.cache
def _native_global_argmax() -> NativeFunction | None:
    """The native version of `global_argmax`, on a CPU."""
    return native_function("elementwise", "best_of_members", "ppii", ELEMENTWISE)


def pad_shard(logits: torch.Tensor, vocab_size: int, world_size: int) -> torch.Tensor:
    """`logits` [n, V/W] padded to the largest shard, so that uneven shards can be gathered in the model's type."""
    missing = ceil_div(vocab_size, world_size) - logits.shape[-1]
    return F.pad(logits, (0, missing)) if missing else logits


def concat_shards(shards: list[torch.Tensor], vocab_size: int) -> torch.Tensor:
    """[n, V] float32 from the gathered `pad_shard` shards in shard order."""
    whole = shards[0].new_empty(len(shards[0]), vocab_size, dtype=torch.float32)
    for index, shard in enumerate(shards):
        span = even_span(vocab_size, index, len(shards))
        whole[:, span.start : span.stop] = shard[:, : span.size]
    return whole
