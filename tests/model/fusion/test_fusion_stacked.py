"""Stacked weights: one product equals the separate ones in every mode, and nothing is stored twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import make_checkpoint, perturb
from tests.model.quantization.checkpoints import FORMATS, make_quantised
from tests.model.test_linear import stored
from tests.model.test_weights_once import live_tensor_bytes
from ulysses_infer.config import ModelConfig
from ulysses_infer.model.fusion import fuse
from ulysses_infer.model.fusion.attention import FusedAttention
from ulysses_infer.model.fusion.feed_forward import FusedFeedForward
from ulysses_infer.model.fusion.stacked import StackedLinears
from ulysses_infer.model.loading.files import MemorySource, SafetensorsSource
from ulysses_infer.model.loading.weights import Weights
from ulysses_infer.model.model import ModelBuilder, ShiftModel
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.quantization.online import OnlineInt4
from ulysses_infer.model.quantization.packed import CompressedWeight
from ulysses_infer.model.quantization.scaled import Grain, ScaledWeight
from ulysses_infer.model.quantization.scheme import Scheme
from ulysses_infer.parallel.layout import Layout, Mode
from ulysses_infer.parallel.sharding import Part, Sharding

LAYOUTS = [
    Layout(Mode(*base), order)
    for base in ((1, 1), (2, 1), (4, 1), (2, 2), (1, 4), (4, 2))
    for order in ("sp_inner", "tp_inner")
]
HEADS = [Part(16, 3), Part(8, 3, shared=True), Part(8, 3, shared=True)]
FEW_HEADS = [Part(16, 3), Part(2, 3, shared=True), Part(2, 3, shared=True)]
NEURONS = [Part(48), Part(48)]


def linears(parts: list[Part], layout: Layout, shard: int, bias: bool = True, inputs: int = 6) -> list[Any]:
    """A linear of each part, as rank `shard` stores it."""
    torch.manual_seed(0)
    return [
        stored(nn.Linear(inputs, part.features, bias=bias), "column", Sharding((part,)), layout, shard)
        for part in parts
    ]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("parts", [HEADS, NEURONS], ids=["q, k, v", "gate, up"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_stacked_product_equals_each_linear_in_every_mode(layout: Layout, parts: list[Part], bias: bool) -> None:
    inputs = torch.randn(5, 6)
    for shard in range(layout.world_size):
        base = layout.place(layout.base, shard)
        apart, together = linears(parts, layout, shard, bias), linears(parts, layout, shard, bias)
        assert StackedLinears.fits(together, base)
        stacked = StackedLinears(together, base)
        for mode in (*layout.modes, *layout.modes[::-1]):
            place = layout.place(mode, shard)
            stacked.bind(place)
            for found, linear in zip(stacked.parts(inputs), apart, strict=True):
                linear.bind(place)
                torch.testing.assert_close(found, linear(inputs))


@pytest.mark.parametrize("kind", ["bias", "plain", "channel"])
@pytest.mark.parametrize(("base", "heads"), [((4, 1), 2), ((8, 1), 4), ((4, 2), 4), ((2, 4), 4), ((2, 2), 2)], ids=str)
def test_two_shards_that_share_a_key_value_head_are_stacked(base: tuple[int, int], heads: int, kind: str) -> None:
    layout, inputs = Layout(Mode(*base)), torch.randn(5, 8)
    parts = [Part(16, 4), Part(heads, 4, shared=True), Part(heads, 4, shared=True)]
    for shard in range(layout.world_size):
        place = layout.place(layout.base, shard)
        apart, together = (
            quantised_linears(fp8("channel"), layout, shard, heads)
            if kind == "channel"
            else linears(parts, layout, shard, kind == "bias", 8)
            for _ in range(2)
        )
        before = [linear.weight.detach().clone() for linear in together]
        assert StackedLinears.fits(together, place)
        stacked = StackedLinears(together, place)
        for mode in (*layout.modes, *layout.modes[::-1]):
            own = layout.place(mode, shard)
            stacked.bind(own)
            query = stacked.shard_parts(inputs)[0]
            assert query.dim() == (3 if mode.sp == 1 else 4)
            for found, linear in zip(stacked.parts(inputs), apart, strict=True):
                linear.bind(own)
                torch.testing.assert_close(found, linear(inputs))
        memory = {linear.weight.untyped_storage().data_ptr() for linear in together}
        assert len(memory) == 1
        for linear, weight in zip(together, before, strict=True):
            assert torch.equal(linear.weight.reshape(weight.shape).float(), weight.float())


def test_four_shards_that_share_a_key_value_head_are_not_stacked() -> None:
    layout = Layout(Mode(8, 1))
    assert not StackedLinears.fits(linears(FEW_HEADS, layout, 0), layout.place(layout.base, 0))
    layout = Layout(Mode(1, 4))
    assert StackedLinears.fits(linears(FEW_HEADS, layout, 0), layout.place(layout.base, 0))


def test_uneven_neurons_are_not_stacked() -> None:
    layout = Layout(Mode(4, 1))
    assert not StackedLinears.fits(linears([Part(21), Part(21)], layout, 0), layout.place(layout.base, 0))


def test_modes_and_parameters_are_views_of_one_tensor() -> None:
    layout = Layout(Mode(4, 2))
    together = linears(HEADS, layout, 5)
    stored_before = [linear.weight.detach().clone() for linear in together]
    stacked = StackedLinears(together, layout.place(layout.base, 5))
    stacked.bind(layout.place(layout.base, 5))
    memory = {linear.weight.untyped_storage().data_ptr() for linear in together}
    assert len(memory) == 1
    assert together[0].weight.untyped_storage().nbytes() == sum(before.numel() * 4 for before in stored_before)
    for linear, before in zip(together, stored_before, strict=True):
        assert torch.equal(linear.weight.flatten(0, 1), before)
    for mode in layout.modes:
        stacked.bind(layout.place(mode, 5))
        assert stacked._piece is not None
        assert {stacked._piece.parts["weight"].untyped_storage().data_ptr()} == memory


def load(
    base: Mode, shard: int, monkeypatch: pytest.MonkeyPatch, seed: int = 0
) -> tuple[Any, ModelBuilder, ShiftModel]:
    """transformers' tiny qwen2 (with biases), and rank `shard`'s part of it, stacked."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(fuse, "should_stack_weights", lambda *_: True)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen2"))
    perturb(model, seed)
    settings = ModelConfig(path="-")
    blueprint = ModelBuilder.from_pretrained(model, settings, Layout(base), shard, torch.device("cpu"))
    return model, blueprint, blueprint.load()


def blocks(model: ShiftModel) -> list[Any]:
    """The fused blocks of a model."""
    return [block for block in model.module.modules() if isinstance(block, FusedAttention | FusedFeedForward)]


@pytest.mark.parametrize(
    ("base", "shard"), [(Mode(1, 1), 0), (Mode(4, 1), 2), (Mode(2, 2), 3), (Mode(8, 1), 5)], ids=str
)
def test_a_model_is_stacked_and_modes_take_no_memory(base: Mode, shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, blueprint, model = load(base, shard, monkeypatch)
    assert all(isinstance(block.inputs[0], StackedLinears) for block in blocks(model))
    assert len(blocks(model)) == 4
    assert model.weight_bytes == blueprint.weight_bytes
    before = live_tensor_bytes()
    for mode in Layout(base).modes:
        model.injection.bind(Layout(base).place(mode, shard))
        assert live_tensor_bytes() == before


@pytest.mark.parametrize("sp", [4, 8])
def test_weight_updates_write_the_stacked_tensor_and_sleep_frees_it(sp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if two shards share each KV head."""
    _, blueprint, model = load(Mode(sp, 1), 2, monkeypatch)
    other, _, expected = load(Mode(sp, 1), 2, monkeypatch, seed=1)
    weights = Weights(blueprint, model, are_borrowed=True)
    inputs = torch.randn(2, model.shape.hidden_size)
    for step in (lambda: None, weights.drop):
        step()
        weights.write(MemorySource(other.state_dict()))
        for mode in Layout(Mode(sp, 1)).modes:
            place = Layout(Mode(sp, 1)).place(mode, 2)
            for ours in (model, expected):
                ours.injection.bind(place)
            for mine, wanted in zip(blocks(model), blocks(expected), strict=True):
                found, wanted_parts = (block.inputs[0].parts(inputs) for block in (mine, wanted))
                assert all(map(torch.equal, found, wanted_parts))
    held = live_tensor_bytes()
    weights.drop()
    assert held - live_tensor_bytes() > 0.9 * blueprint.weight_bytes


def fp8(grain: Grain) -> Scheme:
    return ScaledWeight("weight_scale", grain, (4, 4) if grain == "block" else (1, 1))


def quantised_linears(scheme: Scheme, layout: Layout, shard: int, heads: int = 8) -> list[QuantizedLinear]:
    """q, k and v with random values, scales and biases, as rank `shard` stores them."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for part in (Part(16, 4), Part(heads, 4, shared=True), Part(heads, 4, shared=True)):
        source, base = nn.Linear(8, part.features), layout.place(layout.base, shard)
        linear = QuantizedLinear(source, scheme, "column", Sharding((part,)), base)
        for parameter in linear.parameters():
            parameter.data = random_values(parameter, generator)
        made.append(linear)
    return made


def random_values(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not like.is_floating_point():
        return torch.randint(-(2**31), 2**31, like.shape, generator=generator).to(like.dtype)
    return torch.rand(like.shape, generator=generator).to(like.dtype)


@pytest.mark.parametrize(
    "scheme",
    [fp8("channel"), fp8("block"), CompressedWeight(8), OnlineInt4(8)],
    ids=["fp8 per channel", "fp8 per block", "compressed", "int4 while loading"],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_quantised_weights_are_stacked_with_their_scales(layout: Layout, scheme: Scheme) -> None:
    inputs = torch.randn(5, 8)
    for shard in range(layout.world_size):
        base = layout.place(layout.base, shard)
        apart, together = (quantised_linears(scheme, layout, shard) for _ in range(2))
        assert StackedLinears.fits(together, base)
        stacked = StackedLinears(together, base)
        for mode in layout.modes:
            place = layout.place(mode, shard)
            stacked.bind(place)
            for found, linear in zip(stacked.parts(inputs), apart, strict=True):
                linear.bind(place)
                torch.testing.assert_close(found, linear(inputs))
        for name, _ in together[0].named_parameters():
            assert len({each.get_parameter(name).untyped_storage().data_ptr() for each in together}) == 1


def test_what_has_no_rows_to_stack_is_left_alone() -> None:
    layout = Layout(Mode(1, 1))
    base = layout.place(layout.base, 0)
    assert not StackedLinears.fits(quantised_linears(fp8("tensor"), layout, 0), base)
    dense, quantised = linears(HEADS, layout, 0), quantised_linears(fp8("channel"), layout, 0)
    assert not StackedLinears.fits([dense[0], quantised[1]], base)
    assert not StackedLinears.fits([nn.Linear(6, 6)], base)


def test_blocks_that_a_shard_would_cut_are_not_stacked() -> None:
    layout = Layout(Mode(4, 1))
    (query, *_) = quantised_linears(fp8("block"), layout, 0)
    wide = QuantizedLinear(
        nn.Linear(8, 24),
        ScaledWeight("weight_scale", "block", (4, 4)),
        "column",
        Sharding((Part(4, 6),)),
        layout.place(layout.base, 0),
    )
    assert not StackedLinears.fits([query, wide], layout.place(layout.base, 0))


def test_a_loaded_fp8_model_is_stacked_and_reloads_in_place(tmp_path: Path) -> None:
    make_quantised(tiny_config("qwen3"), tmp_path, FORMATS["compressed-channel"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse, "should_stack_weights", lambda *_: True)
        layout = Layout(Mode(2, 1))
        blueprint = ModelBuilder.from_folder(tmp_path, ModelConfig(path="-"), layout, 1, torch.device("cpu"))
        model = blueprint.load()
    assert all(isinstance(block.inputs[0], StackedLinears) for block in blocks(model))
    before = {name: parameter.detach().clone() for name, parameter in model.module.named_parameters()}
    weights = Weights(blueprint, model, are_borrowed=False)
    weights.drop()
    weights.write(SafetensorsSource(tmp_path))
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter.detach().float(), before[name].float()), name


@pytest.mark.parametrize("quantize", ["int8", "int4", None])
def test_on_a_cpu_weights_are_stacked_if_they_are_quantised_while_loading(quantize: Any, tmp_path: Path) -> None:
    make_checkpoint(tiny_config("llama"), tmp_path)
    settings = ModelConfig(path="-", quantize=quantize, quantize_group_size=32)
    blueprint = ModelBuilder.from_folder(tmp_path, settings, Layout(Mode(2, 1)), 1, torch.device("cpu"))
    model = blueprint.load()
    assert {isinstance(block.inputs[0], StackedLinears) for block in blocks(model)} == {quantize is not None}
    for block in blocks(model) if quantize else ():
        together = block.inputs[0].linears
        for name, parameter in together[0].named_parameters():
            found = [each.get_parameter(name) for each in together]
            assert len({each.untyped_storage().data_ptr() for each in found}) == 1
            assert parameter.untyped_storage().nbytes() == sum(each.nbytes for each in found)
    before = {name: parameter.detach().clone() for name, parameter in model.module.named_parameters()}
    weights = Weights(blueprint, model, are_borrowed=False)
    weights.drop()
    weights.write(SafetensorsSource(tmp_path))
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter.detach(), before[name]), name
