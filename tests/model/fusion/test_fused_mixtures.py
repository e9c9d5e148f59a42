"""Mixtures with all kernels, in Triton's interpreter: transformers' results in few launches."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton")

from tests.equivalence.families import tiny_config, with_experts
from tests.equivalence.tiny_models import perturb
from tests.kernels.interpreter import use_exact_rounding
from tests.model.fusion.test_fusion import CPU, logprobs
from ulysses_infer.config import ModelConfig
from ulysses_infer.kernels.launch import assume, counted
from ulysses_infer.model.fusion.fuse import Fusion
from ulysses_infer.model.fusion.mixture import FusedMixture
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.parallel.layout import Layout, Mode

FAMILIES = {
    "qwen3_moe": with_experts("qwen3_moe", 4),
    "llama4_text": {**with_experts("llama4_text", 4), "num_experts_per_tok": 1},
}
LAUNCHES = {
    "qwen3_moe": {"route_kernel": 2, "sort_kernel": 2, "experts_kernel": 4, "sum_kernel": 2},
    "llama4_text": {"route_kernel": 2, "sort_kernel": 2, "experts_kernel": 4, "sum_kernel": 2},
}
"""Of a step of a model of two layers."""


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_fused_with_unchanged_results(family: str) -> None:
    from transformers import AutoModelForCausalLM

    use_exact_rounding()
    model = AutoModelForCausalLM.from_config(tiny_config(family, **FAMILIES[family]))
    perturb(model)
    plain, fused = (
        ModelBuilder.from_pretrained(model, ModelConfig(path="-"), Layout(Mode(1, 1)), 0, CPU).load(None, False)
        for _ in range(2)
    )
    expected, launches = logprobs(plain), Counter[str]()
    with assume("cpu", (9, 0)):
        Fusion(fused)
        assert sum(isinstance(module, FusedMixture) for module in fused.module.modules()) == 2
        assert fused.decoder is not None
        with counted(launches):
            found = logprobs(fused)
    assert (found - expected).abs().max() < 1e-4
    for kernel, count in LAUNCHES[family].items():
        assert launches[kernel] == 2 * count  # of two steps
