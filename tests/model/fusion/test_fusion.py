"""Fused modules are used only where they are equivalent, and never change the result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import perturb
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.cache.paged import CacheShape, PagedCache
from ulysses_infer.config import ModelConfig
from ulysses_infer.model.fusion.attention import FusedAttention
from ulysses_infer.model.fusion.feed_forward import FusedFeedForward
from ulysses_infer.model.fusion.fuse import Fusion
from ulysses_infer.model.fusion.norm import FusedRMSNorm
from ulysses_infer.model.fusion.torch_elementwise import TorchElementwise
from ulysses_infer.model.injection.probe import trial_context
from ulysses_infer.model.model import ModelBuilder, ShiftModel
from ulysses_infer.parallel.layout import Layout, Mode, Span

CPU = torch.device("cpu")
LENGTH = 12
# Which modules are fused per family: norms, feed-forward blocks, attention blocks, the layer loop.
FORMS = {
    "llama": (5, 2, 2, True),
    "mistral": (5, 2, 2, True),
    "qwen2": (5, 2, 2, True),
    "qwen3": (9, 2, 2, True),
    "qwen3_moe": (9, 0, 2, True),
    "mixtral": (5, 0, 2, True),
    "phi3": (5, 2, 2, True),
    "olmo2": (5, 2, 2, False),
    "granite": (5, 2, 2, False),  # scales its residual sums
    "gemma2": (0, 2, 2, False),  # norms by 1 + weight, and more of them
    "gemma3_text": (0, 2, 2, False),
    "glm4": (9, 2, 0, False),  # rotates neighbours, not halves
    "cohere2": (0, 2, 0, False),
    "starcoder2": (0, 0, 2, False),  # no gate
    "gpt2": (0, 0, 0, False),
}
ROUNDED_ELSEWHERE = {"olmo2": (0, 2, 0, False)}
"""Differences in bfloat16: olmo2 weights its norms and rotates in float32."""


def load(family: str, dtype: torch.dtype, fuse: bool, damage: Callable[[Any], None] | None = None) -> ShiftModel:
    """A tiny random model of one rank; `damage` is done before it is fused."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(family)).to(dtype)
    perturb(model)
    loaded = ModelBuilder.from_pretrained(model, ModelConfig(path="-"), Layout(Mode(1, 1)), 0, CPU).load(None, False)
    if damage is not None:
        damage(loaded.module)
    if fuse:
        Fusion(loaded)
    return loaded


@torch.inference_mode()
def logprobs(model: ShiftModel) -> torch.Tensor:
    """[n, V] of a prompt of `LENGTH` tokens in two chunks, with real attention over a real cache."""
    shape = model.shape
    cache = PagedCache(
        CacheShape.uniform(
            shape.num_layers, shape.num_key_value_heads, shape.key_width, shape.value_width, 4, model.dtype
        ),
        LENGTH,
        CPU,
    )
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, shape.vocab_size, (LENGTH,), generator=draw)
    found = []
    for first, last in ((0, 7), (7, LENGTH)):
        positions = torch.arange(first, last)
        plain = trial_context(model.injection.layout, 0, cache, TorchLoopAttention())  # type: ignore[arg-type]
        metadata = replace(
            plain.attention,
            slots=positions,
            query_lens=[last - first],
            context_lens=[last],
            block_tables=torch.arange(-(-last // 4))[None],
        )
        spans = [Span(0, last - first)]
        context = replace(plain, token_spans=spans, logits_counts=[last - first], attention=metadata)
        found.append(model.forward(tokens[first:last], positions, torch.arange(last - first), context))
    return torch.cat(found).float().log_softmax(-1)


def taken(model: ShiftModel) -> tuple[int, int, int, bool]:
    """The fused forms in `model`."""
    kinds = [type(module) for module in model.module.modules()]
    norms, feed_forwards, attentions = map(kinds.count, (FusedRMSNorm, FusedFeedForward, FusedAttention))
    return norms, feed_forwards, attentions, model.decoder is not None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)], ids=str)
@pytest.mark.parametrize("family", FORMS)
def test_a_family_is_fused_with_unchanged_results(family: str, dtype: torch.dtype, tolerance: float) -> None:
    fused, plain = load(family, dtype, True), load(family, dtype, False)
    forms = FORMS if dtype == torch.float32 else {**FORMS, **ROUNDED_ELSEWHERE}
    assert taken(fused) == forms[family]
    assert taken(plain) == (0, 0, 0, False)
    assert (logprobs(fused) - logprobs(plain)).abs().max() < tolerance


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2"])
def test_torch_fallback_gives_the_same_results(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logprobs(load(family, torch.float32, False))
    monkeypatch.setattr("ulysses_infer.model.fusion.fuse.make_elementwise", lambda dtype, _: TorchElementwise(dtype))
    fused = load(family, torch.float32, True)
    assert taken(fused) == FORMS[family]
    assert (logprobs(fused) - expected).abs().max() < 1e-4


def test_parameters_keep_their_names_and_are_not_copied() -> None:
    plain = load("qwen3", torch.float32, False)
    before = {name: parameter.data_ptr() for name, parameter in plain.module.named_parameters(remove_duplicate=False)}
    Fusion(plain)
    after = {name: parameter.data_ptr() for name, parameter in plain.module.named_parameters(remove_duplicate=False)}
    assert after == before


def wrap(module: Any, change: Callable[[Any], Any]) -> None:
    """Apply `change` to what `module` returns."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: change(forward(*args, **kwargs))


def clip_values(module: Any) -> None:
    """A clamp that only large values show."""

    wrap(module.model.layers[1].self_attn, lambda output: (output[0].clamp(-40.0, 40.0), None))


def scale_feed_forward(module: Any) -> None:
    """Half a per cent more."""
    wrap(module.model.layers[0].mlp, lambda output: output * 1.005)


def shift_norm(module: Any) -> None:
    """A bias after a norm."""
    wrap(module.model.layers[1].input_layernorm, lambda output: output + 0.01)


def scale_layer(module: Any) -> None:
    """A factor on what leaves a layer."""
    wrap(module.model.layers[0], lambda output: output * 1.01)


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (clip_values, (5, 2, 1, True)),
        (scale_feed_forward, (5, 1, 2, True)),
        (shift_norm, (4, 2, 2, False)),
        (scale_layer, (5, 2, 2, False)),
    ],
)
def test_modules_with_other_results_are_not_fused(
    damage: Callable[[Any], None], left: tuple[int, int, int, bool], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ulysses_infer")
    fused = load("llama", torch.float32, True, damage)
    assert taken(fused) == left
    assert ("not fused" in caplog.text) == (damage is not scale_layer)
    assert ("transformers' layer loop" in caplog.text) != left[3]
    assert (logprobs(fused) - logprobs(load("llama", torch.float32, False, damage))).abs().max() < 1e-4
