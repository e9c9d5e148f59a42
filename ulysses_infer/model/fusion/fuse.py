"""The fusion pass: replaces modules of a model by fused ones that pass an equivalence test.

Each rank decides for itself, because a fused module communicates exactly as the original.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.kernels.launch import runs_kernels
from ulysses_infer.model.context import use_step_context
from ulysses_infer.model.fusion.attention import FusedAttention, GatedAttention, PairedAttention, PlacedAttention
from ulysses_infer.model.fusion.decoder import FusedDecoder
from ulysses_infer.model.fusion.elementwise import ACTIVATIONS, Elementwise, NativeElementwise, make_elementwise
from ulysses_infer.model.fusion.equivalence import (
    FACTORS,
    MISMATCH_ERRORS,
    Call,
    is_close,
    is_equivalent_on,
    record_calls,
)
from ulysses_infer.model.fusion.experts import SCORES, FusedRouter, dense_choices, fuse_gate
from ulysses_infer.model.fusion.feed_forward import FusedFeedForward
from ulysses_infer.model.fusion.mixture import FusedMixture
from ulysses_infer.model.fusion.native_router import FACTORS as NATIVE_ROUTER_FACTORS
from ulysses_infer.model.fusion.native_router import NativeRouter
from ulysses_infer.model.fusion.norm import FusedRMSNorm, OffsetRMSNorm
from ulysses_infer.model.fusion.recurrent import is_equivalent_form, warn_of_missing_packages
from ulysses_infer.model.fusion.rotary import FusedRotary
from ulysses_infer.model.fusion.stacked import StackedLinears
from ulysses_infer.model.injection.probe import ProbeAttention, ProbeCache, clear_states, trial_context
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.recurrent.layer import RecurrentLayer

logger = logging.getLogger(__name__)
TOKENS = (3, 5)


def should_stack_weights(device: torch.device, linears: Sequence[nn.Module]) -> bool:
    """Whether to copy the weights of `linears`, which multiply the same input, into one tensor.

    Yes on a GPU, where one large product is faster than several small ones. On a CPU only if they are quantised while
    they are loaded: their input is then quantised once. Others would no longer be in file pages that ranks share.
    """
    is_made_here = all(isinstance(each, QuantizedLinear) and each.online for each in linears)
    return is_made_here or device.type != "cpu" or runs_kernels(device)


class Fusion:
    """Fuses a `ShiftModel` that has passed the probe. `decoder` is the fused layer loop, or None.

    Modules are replaced in place. Weights keep their names.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.injection, self.module = model, model.injection, model.module
        device = next(self.module.parameters()).device
        self.elementwise: Elementwise = make_elementwise(model.dtype, device)
        self.fused: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self._cache, self._attention = ProbeCache.of(model), ProbeAttention()
        layout, shard = model.injection.layout, model.injection.base.shard
        self._tokens = torch.tensor([token % model.shape.vocab_size for token in TOKENS], device=device)
        self._positions = torch.tensor([1, model.shape.max_model_len - 1], device=device)
        context = trial_context(layout, shard, self._cache, self._attention, device, model.state_shapes)
        self._context = replace(context, positions=self._positions)
        # Innermost first: attention blocks are tested with their norms already fused.
        router = NativeRouter if isinstance(self.elementwise, NativeElementwise) else FusedRouter
        for kind in (FusedRMSNorm, FusedFeedForward, router, FusedAttention):
            self._replace_all(kind)
        self._fuse_recurrent()
        for layer in self.injection.expert_layers:
            if runs_kernels(device) or isinstance(self.elementwise, NativeElementwise):
                fuse_gate(layer, self.elementwise, model.dtype, device)
        if runs_kernels(device):
            self._replace_all(FusedMixture)
        self.num_stacked = 0
        self._stack_all()
        self.decoder = self._fuse_decoder()
        self._log_summary()

    def _replace_all(self, kind: Any) -> None:
        found = [module for module in self._modules(kind) if kind.candidate(module)]
        calls, options = self._run(found)
        places = self._parents_of_modules()
        for source in found:
            forms = self._candidates(kind, source, calls.get(source), options)
            proved = next((form for form in forms if self._is_equivalent(source, form, calls[source])), None)
            if proved is None:
                self.kept[type(source).__name__] += 1
            else:
                for parent, name in places[source]:
                    setattr(parent, name, proved)
                self.fused[type(source).__name__] += 1

    def _fuse_recurrent(self) -> None:
        layers = [layer for layer in self.injection.recurrent_layers if isinstance(layer, RecurrentLayer)]
        for layer in layers:
            form = layer.make_native() if self._tokens.is_cpu else None
            if form is not None and is_equivalent_form(layer, form, self.model.dtype):
                layer.native = form
                self.fused[type(layer.module).__name__] += 1
            else:
                self.kept[type(layer.module).__name__] += 1
        warn_of_missing_packages(layers, self._tokens.device)

    def _modules(self, kind: Any) -> list[nn.Module]:
        """The modules that `kind` might replace."""
        attention = set(self.injection.attention_layers)
        if kind is FusedAttention:
            return list(self.injection.attention_layers)
        return [module for module in self.injection.decoder.modules() if module not in attention]

    def _candidates(
        self, kind: Any, source: nn.Module, call: Call | None, options: dict[int, AttentionOptions]
    ) -> Iterator[nn.Module]:
        """Fused modules to try for `source`; none if it did not run, or ran on another dtype than the weights'."""
        if call is None or getattr(call.hidden_states, "dtype", None) != self.model.dtype:
            return
        if kind is FusedRMSNorm and source.weight.dtype == self.model.dtype:
            yield FusedRMSNorm(source, self.elementwise)
            if isinstance(self.elementwise, NativeElementwise):
                yield OffsetRMSNorm(source, self.elementwise)
        elif kind in (NativeRouter, FusedRouter):
            yield from self._routers(kind, source)
        elif kind is FusedMixture:
            yield from (FusedMixture(source, returns_logits) for returns_logits in (False, True))
        elif kind is FusedFeedForward:
            yield from (FusedFeedForward(source, activation, self.elementwise) for activation in ACTIVATIONS)
        elif kind is FusedAttention and not (asked := options[source.layer_idx]).is_per_head:  # type: ignore[index]
            if runs_kernels(self._tokens.device) and PlacedAttention.candidate(source):
                if PairedAttention.candidate(source):
                    yield PairedAttention(source, asked, self.elementwise)
                yield PlacedAttention(source, asked, self.elementwise)
            yield FusedAttention(source, asked, self.elementwise)
            yield GatedAttention(source, asked, self.elementwise)

    def _routers(self, kind: Any, source: nn.Module) -> Iterator[nn.Module]:
        if kind is NativeRouter:
            yield from NativeRouter.forms(source, self.model.dtype)
        elif runs_kernels(self._tokens.device):
            yield from (FusedRouter(source, score) for score in SCORES)

    def _run(self, modules: list[nn.Module]) -> tuple[dict[nn.Module, Call], dict[int, AttentionOptions]]:
        """The inputs of `modules` in one forward of the model, and the attention options of each layer."""
        self._cache.readers.clear()
        self._attention.options.clear()
        with record_calls(modules) as calls:
            self._logits()
        return calls, dict(zip(self._cache.readers, self._attention.options, strict=True))

    def _logits(self) -> torch.Tensor:
        rows = torch.arange(len(TOKENS), device=self._tokens.device)
        clear_states(self._context)
        logits: torch.Tensor = self.model.forward(self._tokens, self._positions, rows, self._context)
        return logits

    @torch.inference_mode()
    def _is_equivalent(self, source: nn.Module, form: nn.Module, call: Call) -> bool:
        with use_step_context(self._context):
            if isinstance(form, FusedRouter | NativeRouter):
                factors = NATIVE_ROUTER_FACTORS if isinstance(form, NativeRouter) else FACTORS
                return is_equivalent_on(call, dense_choices(source), dense_choices(form), factors)
            return is_equivalent_on(call, source, form)

    def _parents_of_modules(self) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
        """All (parent, name) pairs of each module."""
        places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in self.module.modules():
            for name, child in parent.named_children():
                places.setdefault(child, []).append((parent, name))
        return places

    def _stack_all(self) -> None:
        for block in self.module.modules():
            if not isinstance(block, FusedAttention | FusedFeedForward) or len(block.inputs) < 2:
                continue
            linears: Any = block.inputs
            if not should_stack_weights(self._tokens.device, linears):
                continue
            if StackedLinears.fits(linears, self.injection.base):
                stacked = StackedLinears(linears, self.injection.base)
                block.inputs = [stacked]
                self.injection.mode_aware_layers.append(stacked)
                stacked.bind(self.injection.base)
                self.num_stacked += 1
            else:
                self.kept[f"products of {type(block).__name__}"] += 1
        if self.num_stacked:
            self.model.rebind()

    def _fuse_decoder(self) -> FusedDecoder | None:
        base = self.injection.decoder
        base = base.get_decoder() if hasattr(base, "get_decoder") else base
        if not hasattr(base, "layers"):  # transformers does not find llama4's
            base = getattr(base, "model", base)
        if not FusedDecoder.candidate(base):
            return None
        expected = self._logits()
        self.model.decoder = FusedDecoder(base, self.injection.head, self._rotary(base), self.elementwise)
        try:
            proved = is_close(self._logits(), expected)
        except MISMATCH_ERRORS:
            proved = False
        if not proved:
            self.model.decoder = None
        return self.model.decoder

    def _rotary(self, base: Any) -> nn.Module:
        source: nn.Module = base.rotary_emb
        hidden = torch.zeros(1, 1, 1, dtype=self.model.dtype, device=self._tokens.device)
        if FusedRotary.candidate(source):
            fused = FusedRotary(source, self.elementwise)
            if fused.is_equal(hidden, self.model.shape.max_model_len - 1):
                return fused
        return source

    def _log_summary(self) -> None:
        loop = "fused layer loop" if self.decoder else "transformers' layer loop"
        fused = ", ".join(f"{count} {name}" for name, count in self.fused.items()) or "nothing"
        kept = ", ".join(f"{count} {name}" for name, count in self.kept.items())
        stacked = f"; {self.num_stacked} groups of stacked weights" if self.num_stacked else ""
        logger.info("fused: %s; %s%s%s", fused, loop, stacked, f"; not fused: {kept}" if kept else "")
