"""Embeddings of n-grams that some layers add to the residual streams, with a short convolution (Qwen4-Exp's PLE).

Two parts look at earlier tokens. Embeddings are looked up by hashes of the last tokens, in one table with a range of
rows per n-gram head; the convolution has one filter per channel of all streams. A rank owns heads and channels. In
every mode, it looks up all tokens in its rows and convolves its channels of all tokens, and keeps the states of both:
the last token ids, and the last inputs of the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.cache.states import CONVOLUTION, StateCache, StateShape
from ulysses_infer.model.context import StepContext, step_context
from ulysses_infer.model.layers.linear import ShiftLinear
from ulysses_infer.model.quantization.layers import shift_linear
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.recurrent.exchange import InputExchange, heads_to_tokens, tokens_to_heads
from ulysses_infer.model.recurrent.rules import InnerForm, Owner, check_units
from ulysses_infer.model.recurrent.runs import runs_of
from ulysses_infer.model.recurrent.states import LayerStates
from ulysses_infer.model.recurrent.view import ModuleView
from ulysses_infer.parallel.layout import Place, Span
from ulysses_infer.parallel.sharding import Part, Sharding

CONVOLVED, TOKENS = 1, 2  # numbers of the states, after that of the layer's recurrent part


class NGramLayer:
    """Replaces the forward of a PLE module of transformers, which stays in the model with all of its parts."""

    native: InnerForm | None = None

    def __init__(self, name: str, module: Any, owner: Owner, base: Place) -> None:
        self.name, self.module, self.owner = name, module, owner
        embedding, filters = module.ple_embedding, module.conv1d
        table = embedding.ngram_embedding
        self._heads = Part(embedding.ngram_heads, table.embedding_dim)
        self._channels = Part(module.hc_count * module.hidden_size)
        check_units(
            module,
            {"n-gram heads": (self._heads.units, False), "channels": (self._channels.units, False)},
            owner.world_size,
        )
        sharding = Sharding((self._heads,))
        self.linears: list[ShiftLinear | QuantizedLinear] = []
        for child in ("key_proj", "value_proj"):
            self.linears.append(shift_linear(getattr(module, child), "row", sharding, base))
            setattr(module, child, self.linears[-1])
        channels = owner.span(self._channels)
        self._rows = OwnRows(embedding, _own_heads(owner, embedding.ngram_heads))
        self.slices: dict[str, tuple[int, list[Span]]] = {
            f"{name}.ple_embedding.ngram_embedding.weight": (0, [self._rows.rows]),
            f"{name}.conv1d.weight": (0, [channels]),
        }
        """The dimension and the spans of each weight that this rank keeps, by its name in the model."""
        for part, rows in ((table, self._rows.rows), (filters, channels)):
            own = part.weight.narrow(0, rows.start, rows.size).clone()
            part.weight = nn.Parameter(own, requires_grad=False)
        filters.groups = filters.in_channels = filters.out_channels = channels.size
        self._exchange = InputExchange(Sharding((self._channels,)))
        self._embedding = ModuleView(embedding, {"ngram_embedding": self._rows})
        self._view = ModuleView(module, {"ple_embedding": self._embed, "_short_conv": self._convolve})
        layer, length = module.layer_idx, module.short_conv_state_len
        self.state_shapes = [
            StateShape(layer, CONVOLUTION, CONVOLVED, (channels.size, length), filters.weight.dtype),
            StateShape(layer, CONVOLUTION, TOKENS, (embedding.context_len,), torch.int64),
        ]
        """The states that this rank keeps of each sequence, the same in every mode."""
        module.forward = self.forward  # the instance attribute overrides the method

    def bind(self, place: Place) -> None:
        """Switch to the channels of `place`. The linears are bound on their own."""
        self._exchange.bind(place)
        self._place = place

    def forward(self, hidden_states: torch.Tensor, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """hidden_states: [1, t, C]; input_ids: [1, t]; returns what is added to the streams, [1, t, C]."""
        added: torch.Tensor = self._view(hidden_states, input_ids, None)
        return added

    def _embed(self, input_ids: torch.Tensor, _: Any) -> torch.Tensor:
        """input_ids: [1, t]; returns [1, t, features / tp]."""
        context = step_context()
        counts = [span.size for span in context.token_spans]
        tokens = context.collectives.gather_rows(input_ids[0, : context.num_local_tokens, None], counts)
        embedding = self.module.ple_embedding
        own = self._rows.weight.new_empty(len(tokens), self.owner.span(self._heads).size)
        for run in runs_of(_sequences(context)):
            states = TokenStates(_states(context), embedding.layer_idx, run.slots, embedding.eos_token_id)
            run.put(own, self._embedding(run.take(tokens)[..., 0], states).flatten(0, 1))
            states.store()
        return heads_to_tokens(context, own)[None]

    def _convolve(self, hidden_states: torch.Tensor, _: Any) -> torch.Tensor:
        """hidden_states: [1, t, C]; returns [1, t, C]."""
        context, held = step_context(), self._channels.span(self._place.weight_index, self._place.mode.tp)
        (inputs,) = tokens_to_heads(context, [self._exchange], [hidden_states[0, :, held.start : held.stop]])
        own = torch.empty_like(inputs)
        for run in runs_of(_sequences(context)):
            states = LayerStates(_states(context), self.module.layer_idx, run.slots)
            run.put(own, type(self.module)._short_conv(self.module, run.take(inputs), states).flatten(0, 1))
            states.store()
        back = heads_to_tokens(context, own)
        if self._place.mode.tp == 1:
            return back[None]
        whole = torch.zeros_like(hidden_states)
        whole[0, :, held.start : held.stop] = back
        return context.collectives.sum_over_tp(whole)


class OwnRows:
    """The rows of own n-gram heads, looked up by what the module computes for all heads."""

    def __init__(self, embedding: Any, heads: Span) -> None:
        """embedding: with its whole table."""
        self._table, self._heads = embedding.ngram_embedding, heads
        ends = [*embedding.head_offsets, embedding.total_vocab_size]
        self.rows = Span(ends[heads.start], ends[heads.stop])

    @property
    def weight(self) -> torch.Tensor:
        """[own rows, d]."""
        own: torch.Tensor = self._table.weight
        return own

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows: [n, L, all heads], of the whole table; returns [n, L, own heads, d]."""
        own = rows[..., self._heads.start : self._heads.stop] - self.rows.start
        return nn.functional.embedding(own, self.weight)


class TokenStates(LayerStates):
    """The last token ids of sequences. Before the first token they are the end of a text, which is stored as 0."""

    def __init__(self, cache: StateCache, layer: int, slots: torch.Tensor, end: int) -> None:
        super().__init__(cache, layer, slots)
        self._end = end

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        """[n, tokens]."""
        return super().get_conv_state(layer_idx, state_idx) + self._end

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """conv_states: [n, L], the token ids of the step."""
        return super().update_conv_state(conv_states - self._end, layer_idx, state_idx, **kwargs)


def _own_heads(owner: Owner, heads: int) -> Span:
    return owner.span(Part(heads))


def _states(context: StepContext) -> StateCache:
    assert context.states is not None
    return context.states


def _sequences(context: StepContext) -> Any:
    assert context.sequences is not None
    return context.sequences
