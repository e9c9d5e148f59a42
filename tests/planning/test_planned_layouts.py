"""Memory of planned layouts agrees with the loader's own budget."""

from __future__ import annotations

import pytest
from transformers import BambaConfig, FalconH1Config, PreTrainedConfig, Qwen3MoeConfig, Qwen3NextConfig

from tests.equivalence.swiftkv import swiftkv_config
from tests.planning.plans import config, llama_config
from tools.memory_table import draw
from ulysses_infer.cache.states import slot_bytes
from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.layout import Layout, Mode
from ulysses_infer.planning.layouts import all_layouts, weights_of
from ulysses_infer.planning.node import load_node
from ulysses_infer.planning.sizes import sizes_of

MIXTURE = Qwen3MoeConfig(
    hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, num_experts=16, num_experts_per_tok=2, vocab_size=4096, dtype="bfloat16",
)  # fmt: skip

COMMON = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096, "dtype": "bfloat16",
}  # fmt: skip
MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1}
HYBRIDS = {
    "gated delta rule": Qwen3NextConfig(
        **COMMON, head_dim=64, moe_intermediate_size=128, shared_expert_intermediate_size=128, num_experts=16,
        num_experts_per_tok=2, linear_num_key_heads=8, linear_num_value_heads=16, linear_key_head_dim=64,
        linear_value_head_dim=64,
    ),
    "Mamba 2": BambaConfig(**COMMON, **MAMBA, attn_layer_indices=[2]),
    "Mamba 2 beside attention": FalconH1Config(**COMMON, **MAMBA, mamba_d_ssm=1024, head_dim=64),
}  # fmt: skip


@pytest.mark.parametrize("base", [Mode(8, 1), Mode(2, 4), Mode(1, 8)], ids=str)
def test_weights_of_a_dense_model_are_those_that_the_loader_stores(base):
    source = llama_config(dtype="bfloat16")
    stored = draw(source, Layout(base), 0, "replicate").weight_bytes
    assert weights_of(sizes_of(source), base, "replicate") == pytest.approx(stored, rel=0.01)


@pytest.mark.parametrize("placement", ["replicate", "expert", "width"])
def test_weights_of_a_mixture_are_those_that_the_loader_stores(placement):
    stored = draw(MIXTURE, Layout(Mode(2, 2)), 0, placement).weight_bytes
    assert weights_of(sizes_of(MIXTURE), Mode(2, 2), placement) == pytest.approx(stored, rel=0.02)


def test_layers_that_share_keys_store_and_cache_them_once():
    """Six layers: three that all tokens take, and three that read the keys of the first of them."""
    source = swiftkv_config(**COMMON | {"num_hidden_layers": 6}, key_value_group_size=3)
    stored, sizes = draw(source, Layout(Mode(2, 2)), 0, "replicate"), sizes_of(source)
    assert weights_of(sizes, Mode(2, 2), "replicate") == pytest.approx(stored.weight_bytes, rel=0.01)
    caching = [layer for layer in stored.shape.layers if layer is not None and layer.source is None]
    assert sizes.num_caching_layers == len(caching) == 4


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


@pytest.mark.parametrize("source", HYBRIDS.values(), ids=list(HYBRIDS))
def test_weights_and_states_of_a_hybrid_are_those_that_the_loader_stores(source):
    stored, sizes = draw(source, Layout(Mode(2, 1)), 0, "replicate"), sizes_of(source)
    assert weights_of(sizes, Mode(2, 1), "replicate") == pytest.approx(stored.weight_bytes, rel=0.02)
    shapes = [shape for layer in stored.injection.recurrent_layers for shape in layer.state_shapes]
    own = sizes.recurrent.state_bytes() * sizes.num_recurrent_layers / 2
    assert own == pytest.approx(slot_bytes(shapes), rel=0.01)


def test_recurrent_layers_of_an_unknown_form_are_refused():
    source = PreTrainedConfig(**COMMON, layer_types=["linear_attention"] * 4)
    source.model_type = "strange"
    with pytest.raises(ConfigError, match="does not know what the recurrent layers of model type 'strange' keep"):
        sizes_of(source)


def test_states_take_at_most_half_of_the_cache():
    source = HYBRIDS["gated delta rule"]
    layout = all_layouts(sizes_of(source), load_node("2x24gb"), config())[0]
    num_sequences = layout.num_sequences(10**6)
    assert 1 < num_sequences < 10**6
    assert num_sequences * layout.request_bytes <= layout.cache_bytes / 2
    assert layout.cache_tokens(10**6) * layout.token_bytes >= layout.cache_bytes / 2 - layout.token_bytes
