"""One projection of all experts: for any blocks, cut and experts kept, its slice is that of the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.quantization.checkpoints import awq, compressed, fp8_block, fp8_channel, fp8_tensor, gptq
from tests.model.quantization.mixtures import fbgemm, mxfp4
from ulysses_infer.errors import CheckpointError
from ulysses_infer.model.experts import matrix as matrix_module
from ulysses_infer.model.experts.matrix import ExpertMatrix
from ulysses_infer.model.loading.files import MemorySource
from ulysses_infer.model.quantization.grouped import TokenGroups, is_groupable, is_grouped
from ulysses_infer.model.quantization.mxfp4 import Mxfp4Weight
from ulysses_infer.model.quantization.packed import AwqWeight, CompressedWeight, GptqWeight
from ulysses_infer.model.quantization.scaled import ScaledWeight, TransposedScaledWeight
from ulysses_infer.parallel.layout import Layout, Mode, Span
from ulysses_infer.parallel.sharding import Part, Sharding

CPU = torch.device("cpu")
LAYOUTS = [Layout(Mode(*base)) for base in ((1, 1), (4, 1), (2, 2), (4, 2))]
SCHEMES: dict[str, tuple[Any, Any]] = {
    "fp8 block": (fp8_block((7, 9)), ScaledWeight("weight_scale_inv", "block", (7, 9))),
    "fp8 channel": (fp8_channel, ScaledWeight("weight_scale", "channel")),
    "awq": (awq(12), AwqWeight(12)),
    "gptq": (gptq(12), GptqWeight(12)),
    "gptq reordered": (gptq(20, reordered=True), GptqWeight(20, 4, True)),
    "int4": (compressed(12, symmetric=False), CompressedWeight(12, 4, False)),
}
MERGED: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "mxfp4": (mxfp4, Mxfp4Weight(), {"blocks": "_blocks", "scales": "_scales"}),
    "fbgemm": (fbgemm, TransposedScaledWeight(), {"weight": "", "weight_scale": "_scale"}),
}
UP = {"apart": Sharding((Part(64),)), "halves": Sharding((Part(32), Part(32))), "pairs": Sharding((Part(32, width=2),))}
NUM_EXPERTS = 3


@dataclass
class Stored:
    """The experts of a layer as a checkpoint has them, and what they mean."""

    scheme: Any
    source: MemorySource
    suffixes: dict[str, str] | None
    dense: torch.Tensor
    """[E, out, in]"""

    def load(self, cut: Any, sharding: Sharding, own: Span, place: Any) -> ExpertMatrix:
        """The matrix as the rank with base place `place` loads it."""
        sizes = (self.dense.shape[1], self.dense.shape[2])
        matrix = ExpertMatrix(self.scheme, sizes, cut, sharding, NUM_EXPERTS, own, place, CPU)
        for name, parameter in list(matrix.named_parameters()):
            if self.suffixes is not None:
                found = matrix.read_merged(name, self.source, f"up{self.suffixes[name]}")
            else:
                found = matrix.read(name, self.source, {expert: f"{expert}.{name}" for expert in range(NUM_EXPERTS)})
            assert found.shape == parameter.shape
            setattr(matrix, name, torch.nn.Parameter(found.to(parameter.dtype), requires_grad=False))
        return matrix


def store(kind: str, shape: tuple[int, int]) -> Stored:
    return store_as(shape, *{**SCHEMES, **MERGED}[kind])


def store_as(shape: tuple[int, int], quantise: Any, scheme: Any, *merged: dict[str, str]) -> Stored:
    experts = [quantise(weight) for weight in torch.randn(NUM_EXPERTS, *shape)]
    dense = torch.stack([weight for _, weight in experts])
    if merged:
        names = experts[0][0]
        tensors = {f"up{name}": torch.stack([found[name] for found, _ in experts]) for name in names}
    else:
        tensors = {f"{i}.{name}": part for i, (found, _) in enumerate(experts) for name, part in found.items()}
    return Stored(scheme, MemorySource(tensors), merged[0] if merged else None, dense)


def product(matrix: ExpertMatrix, inputs: int) -> torch.Tensor:
    """The output of every own expert for the unit vectors: its weights, [own, out, in]."""
    own = matrix.own.size
    groups = TokenGroups(torch.arange(1, own + 1) * inputs)
    return matrix(torch.eye(inputs).repeat(own, 1), groups).view(own, inputs, -1).transpose(1, 2)


def check_slices(stored: Stored, cut: Any, sharding: Sharding) -> None:
    """For every rank in every mode of every layout: the experts it keeps, and its slice of each. None cuts both."""
    for layout in LAYOUTS:
        for shard in range(layout.world_size):
            own = Span(1, 2) if layout.base.tp == 1 and shard % 2 == 0 else Span(0, NUM_EXPERTS)
            matrix = stored.load(cut, sharding, own, layout.place(layout.base, shard))
            for mode in layout.modes:
                place = layout.place(mode, shard)
                matrix.bind(place)
                spans = sharding.spans(place.weight_index, place.mode.tp)
                chosen = torch.cat([torch.arange(*span) for span in spans])
                dense = stored.dense[slice(*own)]
                wanted = dense[:, chosen] if cut == "column" else dense[:, :, chosen]
                torch.testing.assert_close(product(matrix, wanted.shape[2]), wanted)


@pytest.mark.parametrize("cut", ["column", "row"])
@pytest.mark.parametrize("kind", [*SCHEMES, *MERGED])
def test_slices_of_all_experts_are_slices_of_the_whole(kind: str, cut: str) -> None:
    if cut == "column":
        check_slices(store(kind, (44, 64)), cut, Sharding((Part(44),)))
    else:
        check_slices(store(kind, (21, 64)), cut, Sharding((Part(64),)))


@pytest.mark.parametrize("layout", UP)
@pytest.mark.parametrize("kind", MERGED)
def test_gate_and_up_in_one_matrix_are_cut_each(kind: str, layout: str) -> None:
    check_slices(store(kind, (64, 32)), "column", UP[layout])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(8, 60), st.sampled_from(["column", "row"]))
def test_any_blocks_and_any_width(rows: int, columns: int, width: int, cut: Any) -> None:
    scheme = ScaledWeight("weight_scale_inv", "block", (rows, columns))
    shape = (width, 11) if cut == "column" else (11, width)
    check_slices(store_as(shape, fp8_block((rows, columns)), scheme), cut, Sharding((Part(width),)))


def test_experts_without_tokens_are_not_read() -> None:
    stored = store("fp8 channel", (8, 16))
    place = Layout(Mode(1, 1)).place(Mode(1, 1), 0)
    matrix = stored.load("column", Sharding((Part(8),)), Span(0, 3), place)
    with torch.no_grad():
        matrix.get_parameter("weight_scale")[1] = float("nan")
    matrix.bind(place)
    found = matrix(torch.ones(4, 16), TokenGroups(torch.tensor([3, 3, 4])))
    torch.testing.assert_close(found[:3], stored.dense[0].sum(1).expand(3, 8))
    torch.testing.assert_close(found[3], stored.dense[2].sum(1))


def test_every_mode_reads_views_of_what_is_stored_once() -> None:
    layout = Layout(Mode(4, 1))
    matrix = store("fp8 block", (44, 64)).load("row", Sharding((Part(64),)), Span(0, 3), layout.place(layout.base, 1))
    for mode in layout.modes:
        matrix.bind(layout.place(mode, 1))
        for _, _, views in matrix._pieces:
            for name, view in views.items():
                assert view.untyped_storage().data_ptr() == matrix.get_parameter(name).untyped_storage().data_ptr()


def test_a_missing_or_a_wrong_expert_is_refused() -> None:
    stored = store("fp8 channel", (8, 16))
    place = Layout(Mode(1, 1)).place(Mode(1, 1), 0)
    matrix = stored.load("column", Sharding((Part(8),)), Span(0, 1), place)
    with pytest.raises(CheckpointError, match=r"has 2 tensors like 0.weight, but .* makes it 3 experts"):
        matrix.read("weight", stored.source, {0: "0.weight", 2: "2.weight"})
    wrong = MemorySource({f"{expert}.weight": torch.randn(8, 16) for expert in range(3)})
    with pytest.raises(CheckpointError, match="stored as float32, but quantization_config makes it float8_e4m3fn"):
        matrix.read("weight", wrong, {expert: f"{expert}.weight" for expert in range(3)})


def test_four_bit_values_are_those_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored = store("mxfp4", (44, 64))
    source, place = stored.source, Layout(Mode(1, 1)).place(Mode(1, 1), 0)
    matrix = stored.load("column", Sharding((Part(44),)), Span(0, 3), place)
    matrix.bind(place)
    blocks, scales = source.read("up_blocks", None), source.read("up_scales", None)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(product(matrix, 64).transpose(1, 2), theirs)


def scaled_grouped_mm(values, weight, scales, channels, offs, out_dtype):  # type: ignore[no-untyped-def]
    """What torch's kernel computes, expert by expert; torch itself checks shapes and strides, on the meta device."""
    operands = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (values, weight)]
    others = [torch.empty_strided(t.shape, t.stride(), device="meta") for t in (scales, channels)]
    torch._C._VariableFunctions._scaled_grouped_mm(*operands, *others, offs=offs.to("meta"), out_dtype=out_dtype)
    output, start = torch.full((len(values), weight.shape[2]), float("nan")), 0
    for expert, end in enumerate(offs.tolist()):
        own = values[start:end].float() * scales[start:end, None]
        output[start:end] = own @ (weight[expert].float() * channels[expert])
        start = end
    return output.to(out_dtype)


@pytest.mark.parametrize("cut", ["column", "row"])
@pytest.mark.parametrize("grain", ["channel", "tensor"])
def test_one_product_for_all_experts_equals_one_each(grain: Any, cut: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quantise = fp8_channel if grain == "channel" else fp8_tensor("weight_scale", ())
    layout, sharding = Layout(Mode(2, 1)), Sharding((Part(96),))
    scheme = ScaledWeight("weight_scale", grain)
    stored = store_as((96, 64) if cut == "column" else (64, 96), quantise, scheme)
    matrix = stored.load(cut, sharding, Span(0, 3), layout.place(layout.base, 1))
    matrix.bind(layout.place(Mode(1, 2), 1))
    tokens = torch.randn(9, 64 if cut == "column" else 48)
    groups = TokenGroups(torch.tensor([4, 4, 7], dtype=torch.int32))
    exact = matrix(tokens, groups)[:7]
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)
    monkeypatch.setattr(matrix_module, "is_grouped", lambda scheme, views: is_groupable(scheme, views["weight"]))
    found = matrix(tokens, groups)[:7]
    assert not torch.equal(found, exact), "tokens are quantised here"
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_only_aligned_views_are_grouped() -> None:
    scheme = ScaledWeight("weight_scale", "channel")
    weight = torch.zeros(3, 64, 128, dtype=torch.float8_e4m3fn)
    assert is_groupable(scheme, weight)
    assert is_groupable(scheme, weight[:, :32, 16:64])
    assert not is_groupable(scheme, weight[:, :, 8:64])
    assert not is_groupable(scheme, weight[:, :40])
    assert not is_groupable(scheme, weight[:0])
    assert not is_groupable(ScaledWeight("weight_scale_inv", "block", (128, 128)), weight)
    assert not is_grouped(scheme, {"weight": weight, "weight_scale": torch.ones(3, 64, 1)}), "there is no GPU"
