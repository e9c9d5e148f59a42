"""Sparse activations whose neurons are on several ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

from ulysses_infer.model.context import use_step_context
from ulysses_infer.model.layers.sparsity import ShardedTopK
from ulysses_infer.parallel.layout import Layout, Mode, even_span

WIDTH, TOKENS = 90, 5


@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("ranks", [1, 2, 4])  # four: neurons do not divide
def test_the_cutoff_is_that_of_all_neurons(ranks: int, mean: float) -> None:
    config = CONFIG_MAPPING["gemma3n_text"](
        num_hidden_layers=1, hidden_size=8, intermediate_size=[WIDTH], activation_sparsity_pattern=[0.9]
    )
    whole = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(ranks)) + mean
    expected = Gemma3nTextMLP(config)._gaussian_topk(whole)
    assert 0.05 < (expected > 0).float().mean() < 0.2
    assert (sharded(whole, ranks) - expected).abs().max() < 1e-6 * (1 + mean)


def sharded(whole: torch.Tensor, ranks: int) -> torch.Tensor:
    """The result of all ranks, which run one after another: once for their terms, once with the sum of those."""
    terms: list[torch.Tensor] = []

    def keep(term: torch.Tensor) -> torch.Tensor:
        terms.append(term.clone())
        return term

    def total(_: torch.Tensor) -> torch.Tensor:
        return torch.stack(terms).sum(0)

    for sum_over_tp in (keep, total):
        parts = [_run(whole, rank, ranks, sum_over_tp) for rank in range(ranks)]
    assert len(terms) == (ranks if ranks > 1 else 0)
    return torch.cat(parts, dim=-1)


def _run(whole: torch.Tensor, rank: int, ranks: int, sum_over_tp: Any) -> torch.Tensor:
    own, layer = even_span(WIDTH, rank, ranks), ShardedTopK(0.9, WIDTH)
    layer.bind(Layout(Mode(1, ranks)).place(Mode(1, ranks), rank))
    context: Any = SimpleNamespace(collectives=SimpleNamespace(sum_over_tp=sum_over_tp))
    with use_step_context(context):
        return layer(whole[..., own.start : own.stop])
