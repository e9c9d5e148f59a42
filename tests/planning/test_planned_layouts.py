"""Memory of planned layouts agrees with the loader's own budget."""

from __future__ import annotations

import pytest
from transformers import Qwen3MoeConfig

from tests.planning.plans import config, llama_config
from tools.memory_table import draw
from ulysses_infer.parallel.layout import Layout, Mode
from ulysses_infer.planning.layouts import all_layouts, weights_of
from ulysses_infer.planning.node import load_node
from ulysses_infer.planning.sizes import sizes_of

MIXTURE = Qwen3MoeConfig(
    hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, num_experts=16, num_experts_per_tok=2, vocab_size=4096, dtype="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize("base", [Mode(8, 1), Mode(2, 4), Mode(1, 8)], ids=str)
def test_weights_of_a_dense_model_are_those_that_the_loader_stores(base):
    source = llama_config(dtype="bfloat16")
    stored = draw(source, Layout(base), 0, "replicate").weight_bytes
    assert weights_of(sizes_of(source), base, "replicate") == pytest.approx(stored, rel=0.01)


@pytest.mark.parametrize("placement", ["replicate", "expert", "width"])
def test_weights_of_a_mixture_are_those_that_the_loader_stores(placement):
    stored = draw(MIXTURE, Layout(Mode(2, 2)), 0, placement).weight_bytes
    assert weights_of(sizes_of(MIXTURE), Mode(2, 2), placement) == pytest.approx(stored, rel=0.02)


def test_every_division_of_the_devices_is_listed():
    layouts = all_layouts(sizes_of(llama_config()), load_node("8xh200"), config())
    assert len(layouts) == 10
    assert all(layout.dp * layout.base.world_size == 8 for layout in layouts)
    assert all(layout.reason is None for layout in layouts)


def test_a_model_that_is_too_large_says_how_much_is_missing():
    sizes = sizes_of(llama_config(hidden_size=8192, num_hidden_layers=80, intermediate_size=28672))
    layouts = {str(layout): layout for layout in all_layouts(sizes, load_node("2x24gb"), config())}
    assert "too much" in str(layouts["sp1xtp2"].reason)
    more = {str(layout): layout for layout in all_layouts(sizes, load_node("8xh200"), config(), num_nodes=2)}
    assert more["dp2 sp1xtp8"].reason is None
