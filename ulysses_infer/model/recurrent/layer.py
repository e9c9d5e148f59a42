"""`RecurrentLayer`: transformers' recurrent layer, run over all tokens by each rank for its own heads or channels."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ulysses_infer.cache.states import StateCache, StateShape
from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.context import StepContext, step_context
from ulysses_infer.model.layers.linear import Cut, ShiftLinear
from ulysses_infer.model.quantization.layers import shift_linear
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.quantization.scheme import MARK
from ulysses_infer.model.recurrent.exchange import InputExchange, heads_to_tokens, tokens_to_heads
from ulysses_infer.model.recurrent.rules import InnerForm, Input, Owner, Rule, check_units
from ulysses_infer.model.recurrent.runs import Run, runs_of
from ulysses_infer.model.recurrent.states import LayerStates, RecordedStates
from ulysses_infer.model.recurrent.view import ModuleView
from ulysses_infer.parallel.layout import Place, Span
from ulysses_infer.parallel.sharding import Sharding, merge

CACHE_NAMES = ("cache_params", "past_key_values")
RECORDED_TOKENS = 2


class RecurrentLayer:
    """Replaces the forward of a recurrent layer of transformers, which stays in the model with all of its parts.

    The projections are those of the mode, as for attention. An all-to-all takes their outputs from tokens to heads,
    where the forward of the layer's class runs on all tokens; another one takes its result back.
    """

    def __init__(self, name: str, module: Any, rule: Rule, owner: Owner, base: Place) -> None:
        check_units(module, rule.units, owner.world_size)
        self.name, self.module, self.rule, self.owner = name, module, rule, owner
        self._dtype = module.get_submodule(rule.inputs[0].name).weight.dtype  # of what a quantised one computes, too
        self.linears = [
            *(self._cut(each.name, "column", each.sharding, base) for each in rule.inputs if each.name),
            *([self._cut(rule.output, "row", Sharding((rule.output_part,)), base)] if rule.output else []),
        ]
        self.slices = {f"{name}.{leaf}": kept for leaf, kept in self._keep_own_weights().items()}
        """The dimension and the spans of each weight that this rank keeps, by its name in the model."""
        for attribute, parts in rule.counts.items():
            sizes = [part.span(owner.shard, owner.world_size).size for part in parts]
            path, _, leaf = attribute.rpartition(".")
            setattr(module.get_submodule(path), leaf, sum(sizes))
        self._exchanges = [InputExchange(each.sharding) for each in rule.inputs]
        self._fed: list[torch.Tensor] = []
        self._view = self._make_view(module)
        self._cache_name = _cache_name(module, rule)
        self.state_shapes = self._find_state_shapes()
        """The states that this rank keeps of each sequence, the same in every mode."""
        self.native: InnerForm | None = None
        """Runs the inner part instead of the forward of the layer's class."""
        module.forward = self.forward  # the instance attribute overrides the method

    def _cut(self, path: str, cut: Cut, sharding: Sharding, base: Place) -> ShiftLinear | QuantizedLinear:
        linear = shift_linear(self.module.get_submodule(path), cut, sharding, base)
        self.module.set_submodule(path, linear)
        return linear

    def _keep_own_weights(self) -> dict[str, tuple[int, list[Span]]]:
        """Shrink the weights of the inner part, still on the meta device, and its buffers to those of this rank."""
        kept = {}
        for weight in self.rule.weights:
            path, _, leaf = weight.name.rpartition(".")
            parent = self.module.get_submodule(path)
            whole = getattr(parent, leaf, None)
            if whole is None:
                continue
            if hasattr(parent, MARK):
                raise UnsupportedModelError(f"{self.name}.{path} is quantized; only projections in and out may be")
            spans = merge(self.owner.spans(weight.sharding))
            own = torch.cat([whole.narrow(weight.dimension, span.start, span.size) for span in spans], weight.dimension)
            setattr(parent, leaf, nn.Parameter(own, requires_grad=False) if isinstance(whole, nn.Parameter) else own)
            kept[weight.name] = weight.dimension, spans
        return kept

    def _make_view(self, module: Any) -> ModuleView:
        rule = self.rule
        replaced: dict[str, Any] = {} if rule.replaced is None else dict(rule.replaced(module, self.owner))
        for index, each in enumerate(rule.inputs):
            replaced[each.name] = _Fed(self, index)
            if each.before is not None:
                replaced[each.before] = _unchanged
        if rule.output:
            replaced[rule.output] = _unchanged
        return ModuleView(module, replaced, rule.functions, rule.forward)

    def _find_state_shapes(self) -> list[StateShape]:
        """Run the layer on device `meta`."""
        module = copy.deepcopy(self.module).to("meta")
        states = RecordedStates(self.module.layer_idx)
        like = next(module.parameters())
        sizes = self.own_widths
        self._fed = [like.new_empty(1, RECORDED_TOKENS, size, dtype=self._dtype) for size in sizes]
        view = self._make_view(module)
        view.states = states
        with torch.no_grad():
            view(self._fed[0], **{self._cache_name: states})
        return states.shapes

    @property
    def own_widths(self) -> list[int]:
        """Own features of each projection's output."""
        return [sum(span.size for span in self.owner.spans(each.sharding)) for each in self.rule.inputs]

    def make_native(self) -> InnerForm | None:
        """The form of the inner part in C; None if there is none for this layer on this machine."""
        return None if self.rule.native is None else self.rule.native(self.module, self._dtype, self.owner)

    # -- running -----------------------------------------------------------------------------------------------

    def bind(self, place: Place) -> None:
        """Switch to the features of `place`. The linears are bound on their own."""
        for exchange in self._exchanges:
            exchange.bind(place)

    def forward(self, hidden_states: torch.Tensor, *_: Any, attention_mask: Any = None, **__: Any) -> Any:
        """hidden_states: [1, t, D]; returns the same shape, with None if the rule says so."""
        if attention_mask is not None:
            raise UnsupportedModelError(f"{type(self.module).__name__} got an attention mask, which is not supported")
        context = step_context()
        outputs = [self._project(each, hidden_states[0]) for each in self.rule.inputs]
        result = self._run(context, tokens_to_heads(context, self._exchanges, outputs))
        back = heads_to_tokens(context, result)[None]
        output = self.module.get_submodule(self.rule.output)(back) if self.rule.output else back
        return (output, None) if self.rule.returns_pair else output

    def _project(self, each: Input, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [t, D]; returns [t, features / tp]."""
        scale = getattr(self.module, each.scale, None) if each.scale else None
        if scale is not None:
            hidden = hidden * scale
        if each.before is not None:
            hidden = self.module.get_submodule(each.before)(hidden)
        if not each.name:
            return hidden
        output: torch.Tensor = self.module.get_submodule(each.name)(hidden)
        return output

    def _run(self, context: StepContext, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """inputs: each [T, own features]; returns [T, own features of the result]."""
        assert context.sequences is not None
        runs = runs_of(context.sequences)
        if len(runs) == 1:
            return self._run_one(context, runs[0], inputs)
        result = inputs[0].new_empty(inputs[0].shape[0], self.owner.span(self.rule.output_part).size)
        for run in runs:
            run.put(result, self._run_one(context, run, inputs))
        return result

    def _run_one(self, context: StepContext, run: Run, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns [n * length, own features]."""
        assert context.states is not None
        if self.native is not None:
            return self.native(context.states, self.module.layer_idx, run, inputs)
        return self.run_inner(context.states, run, inputs)

    def run_inner(self, cache: StateCache, run: Run, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Run the forward of the layer's class. inputs: each [T, own features]; returns [n * length, own features]."""
        states = LayerStates(cache, self.module.layer_idx, run.slots)
        self._fed = [run.take(each) for each in inputs]
        self._view.states = states
        output = self._view(self._fed[0], **{self._cache_name: states})
        states.store()
        self._fed, self._view.states = [], None  # frees memory, which captured steps share
        result: torch.Tensor = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)
        return result


class _Fed:
    """Stands in for a projection: returns what it has computed for the own heads."""

    def __init__(self, layer: RecurrentLayer, index: int) -> None:
        self._layer, self._index = layer, index

    def __call__(self, _: torch.Tensor) -> torch.Tensor:
        return self._layer._fed[self._index]


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def _cache_name(module: Any, rule: Rule) -> str:
    parameters = inspect.signature(rule.forward or type(module).forward).parameters
    name = next((name for name in CACHE_NAMES if name in parameters), None)
    if name is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no cache among its arguments")
    return name
