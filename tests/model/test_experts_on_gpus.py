"""Layers of experts as a GPU runs them, in Triton's interpreter: a CPU's results, and no reads by the host."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.equivalence.cases import check as check_outcomes
from tests.equivalence.families import tiny_config, with_experts
from tests.equivalence.tiny_models import make_checkpoint, make_prompts, make_reference
from tests.kernels.interpreter import use_exact_rounding
from tests.model.fusion.test_fusion_kernels import KERNELS, LENGTHS, NEW_TOKENS, run_with_kernels
from tests.model.quantization.mixtures import MIXTURES, make_mixture
from tests.model.quantization.test_expert_matrix import MERGED, check_slices, store
from tests.model.quantization.test_expert_matrix import SCHEMES as SCHEMES_OF_MATRICES
from ulysses_infer.config import ModelConfig
from ulysses_infer.kernels.launch import assume, counted
from ulysses_infer.model.experts import host_reads
from ulysses_infer.model.experts import layer as layer_module
from ulysses_infer.model.experts.layer import ExpertLayer, Routed
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.model.quantization.expert_scheme import EXPERTS_MARK, ExpertScheme
from ulysses_infer.model.quantization.float_zeros import FloatZeroWeight
from ulysses_infer.model.quantization.packed import AwqWeight, GptqWeight
from ulysses_infer.model.quantization.scaled import ScaledWeight
from ulysses_infer.parallel.layout import Layout, Mode, Span, even_span
from ulysses_infer.parallel.sharding import Part, Sharding
from ulysses_infer.worker.graphs.capture_checker import HOST_READS, CaptureChecker, CaptureError

pytest.importorskip("triton")

from ulysses_infer.kernels import experts as kernels

CPU, META = torch.device("cpu"), torch.device("meta")
HOPPER, ADA = (9, 0), (8, 9)


class NoHostReads(TorchDispatchMode):
    """Refuses what reads a tensor's values. The interpreter moves tensors, so `CaptureChecker` cannot be used."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in HOST_READS
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    use_exact_rounding()
    monkeypatch.setattr(kernels, "tiles_of", lambda *shape, **options: kernels.Tiles(16, 64, 64, 4, 1))


def load_layer(folder: Path, base: Mode, shard: int, placement: str, dtype: str = "float32") -> ExpertLayer:
    settings = ModelConfig(path=str(folder), dtype=dtype)
    builder = ModelBuilder.from_folder(folder, settings, Layout(base), shard, CPU, expert_placement=placement)
    return builder.load(fuse=False).injection.expert_layers[0]


def tokens_of(layer: ExpertLayer, num_tokens: int, dtype: torch.dtype = torch.float32) -> Routed:
    """Random tokens, of which some chose the same experts; some experts have none."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 64, dtype=dtype)
    scores = torch.rand(num_tokens, layer.num_experts)
    scores[:, 1] = -1.0
    weights, experts = scores.topk(2, dim=-1)
    return Routed(hidden, experts, weights.to(dtype))


def check(layer: ExpertLayer, capability: tuple[int, int], routed: Routed, tolerance: float = 1e-5) -> None:
    """The layer's output on a GPU of this capability is that on a CPU, also if its activation is known to be SiLU."""
    with torch.inference_mode():
        expected = layer.compute(routed)
        before = layer.token_counts()
        for times, activation in enumerate((None, "silu"), start=2):
            layer.weights.activation = activation
            launched: Counter[str] = Counter()
            with assume("cpu", capability), counted(launched), NoHostReads():
                found = layer.compute(routed)
            assert launched["experts_kernel"] >= 2
            assert layer.token_counts() == [times * count for count in before]
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    if layer.weights.stored() is not None:
        assert launched == {"sort_kernel": 1, "experts_kernel": 2, "sum_kernel": 1}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_mixture(made[name], MIXTURES[name], **with_experts(MIXTURES[name].family, 4))
        return made[name]

    return get


@pytest.mark.parametrize("name", MIXTURES)
def test_quantised_experts(name: str, mixture: Any) -> None:
    """A slice of the width of every expert, which ends within blocks and words."""
    layout = Layout(Mode(2, 1))
    layer = load_layer(mixture(name), layout.base, 1, "replicate")
    layer.bind(layout.place(Mode(1, 2), 1))
    check(layer, ADA, tokens_of(layer, 3))


@pytest.mark.thorough
@pytest.mark.parametrize("cut", ["column", "row"])
@pytest.mark.parametrize("kind", [*SCHEMES_OF_MATRICES, *MERGED])
def test_slices_of_every_layout(kind: str, cut: str) -> None:
    shape, size = ((44, 64), 44) if cut == "column" else ((21, 64), 64)
    with assume("cpu", ADA):
        check_slices(store(kind, shape), cut, Sharding((Part(size),)))


@pytest.mark.parametrize("placement", ["replicate", "expert", "width"])
def test_dense_experts(placement: str, tmp_path: Path) -> None:
    make_checkpoint(tiny_config("qwen3_moe", **with_experts("qwen3_moe", 4)), tmp_path)
    layout = Layout(Mode(2, 1))
    layer = load_layer(tmp_path, layout.base, 1, placement)
    layer.bind(layout.place(Mode(1, 2), 1))
    check(layer, HOPPER, tokens_of(layer, 5))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bfloat16_experts_are_multiplied_by_torch_where_it_needs_no_host(family: str, tmp_path: Path) -> None:
    make_checkpoint(tiny_config(family, **with_experts(family, 4)), tmp_path)
    layer = load_layer(tmp_path, Mode(1, 1), 0, "replicate", "bfloat16")
    layer.bind(Layout(Mode(1, 1)).place(Mode(1, 1), 0))
    routed = tokens_of(layer, 4, torch.bfloat16)
    check(layer, ADA, routed, 2e-2)
    layer.weights.activation = None
    layer.bind(Layout(Mode(1, 1)).place(Mode(1, 1), 0))
    launched: Counter[str] = Counter()
    with torch.inference_mode(), assume("cpu", HOPPER), counted(launched), NoHostReads():
        found = layer.compute(routed)
    assert "experts_kernel" not in launched
    with torch.inference_mode():
        torch.testing.assert_close(found, layer.compute(routed), atol=2e-2, rtol=2e-2)


def test_a_rank_without_experts_computes_nothing(tmp_path: Path) -> None:
    make_checkpoint(tiny_config("qwen3_moe", **with_experts("qwen3_moe", 3)), tmp_path)
    layer = load_layer(tmp_path, Mode(4, 1), 0, "expert")
    assert layer.weights.own.size == 0
    routed = tokens_of(layer, 2)
    with torch.inference_mode(), assume("cpu", HOPPER), NoHostReads():
        output = layer.compute(routed)
    assert torch.equal(output, torch.zeros(2, 64))


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize(("name", "placement"), [("qwen3-fp8", "expert"), ("gpt-oss-mxfp4", "width")])
def test_quantised_mixtures_on_two_ranks(name: str, placement: str, rank_pool: Any, tmp_path: Path) -> None:
    """All Triton kernels in every mode: transformers' answers of the same weights made dense."""
    model = make_mixture(tmp_path, MIXTURES[name], **with_experts(MIXTURES[name].family, 4))
    expected = make_reference(model, tmp_path, make_prompts(lengths=LENGTHS), NEW_TOKENS)
    placed = {**KERNELS.settings, "parallel.expert_placement": placement}
    profile = replace(KERNELS, settings=placed)
    outcomes = rank_pool(2).run(run_with_kernels, tmp_path, (2, 1), profile, expected.prompts, timeout=600)
    check_outcomes(outcomes, expected, profile, num_modes=2)


# -- captured steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_experts", "world_size"), [(6, 4), (3, 8), (128, 8), (60, 7), (1, 2)])
def test_owners_of_experts_are_computed_without_a_table(num_experts: int, world_size: int) -> None:
    wanted = [g for g in range(world_size) for _ in range(even_span(num_experts, g, world_size).size)]
    layer = SimpleNamespace(_world_size=world_size, num_experts=num_experts, first_member=2)
    found = ExpertLayer._members(layer, torch.arange(num_experts))  # type: ignore[arg-type]
    assert found.tolist() == [owner - 2 for owner in wanted]


@pytest.mark.parametrize("is_captured", [False, True])
def test_captured_steps_do_not_send_tokens_by_counts(
    is_captured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tiny_config("qwen3_moe", **with_experts("qwen3_moe", 4)), tmp_path)
    layout, called = Layout(Mode(2, 1)), list[str]()
    layer, place = load_layer(tmp_path, layout.base, 1, "expert"), layout.place(Mode(2, 1), 1)
    layer.bind(place)
    monkeypatch.setattr(layer_module, "dispatch_pays", lambda *sizes: True)
    monkeypatch.setattr(layer_module, "dispatch", lambda *given: called.append("dispatch"))
    monkeypatch.setattr(layer_module, "gather_tokens", lambda *given: called.append("gather") or given[1])
    monkeypatch.setattr(layer_module, "return_parts", lambda _, partial, *given: partial[:, None])
    context: Any = SimpleNamespace(
        collectives=SimpleNamespace(place=place), token_spans=[Span(0, 2), Span(2, 4)], is_captured=is_captured
    )
    with torch.inference_mode():
        layer.forward(tokens_of(layer, 2), context)
    assert called == ["gather" if is_captured else "dispatch"]


def test_experts_read_the_host_only_where_the_kernel_does_not_run() -> None:
    layers: Any = [object()]
    assert host_reads([], CPU) == host_reads([], META) == ""
    assert host_reads(layers, META) == (
        "experts are multiplied one by one, because meta does not run the Triton kernel for all at once"
    )
    for capability, reads in (((7, 5), True), ((8, 0), False), (ADA, False), (HOPPER, False), ((10, 0), False)):
        with assume("meta", capability):
            assert bool(host_reads(layers, META)) == reads


# -- real sizes, on device meta ------------------------------------------------------------------------------------

QWEN = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
SCHEMES: dict[str, Any] = {
    "bfloat16": None,
    "FP8 block": ScaledWeight("weight_scale_inv", "block", (128, 128)),
    "FP8 channel": ScaledWeight("weight_scale", "channel"),
    "AWQ": AwqWeight(128),
    "GPTQ": GptqWeight(128),
    "int4": FloatZeroWeight(32),
}


def qwen_layer(name: str, layout: Layout, placement: str) -> ExpertLayer:
    """One layer of Qwen3-30B-A3B on device meta."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    with META:
        module: Any = Qwen3MoeExperts(Qwen3MoeConfig(**QWEN, dtype="bfloat16")).to(torch.bfloat16)
    if SCHEMES[name] is not None:
        projections = ("gate_proj", "up_proj", "down_proj")
        setattr(module, EXPERTS_MARK, ExpertScheme(dict.fromkeys(projections, SCHEMES[name])))
    layer = ExpertLayer(module, placement, layout, layout.world_size - 1)
    for key, parameter in list(module.named_parameters(recurse=False)):
        if (kept := layer.slices(key)) is not None:
            shape = list(parameter.shape)
            shape[kept[0]] = sum(span.size for span in kept[1])
            setattr(module, key, torch.nn.Parameter(parameter.new_empty(shape), requires_grad=False))
    return layer


@pytest.mark.parametrize(
    "capability", [HOPPER, *(pytest.param(each, marks=pytest.mark.thorough) for each in ((8, 0), (10, 0)))], ids=str
)
@pytest.mark.parametrize("name", SCHEMES)
def test_qwen3_30b_a3b_on_eight_gpus(name: str, capability: tuple[int, int]) -> None:
    for base, placement in ((Mode(8, 1), "replicate"), (Mode(8, 1), "expert"), (Mode(4, 2), "width")):
        layout = Layout(base)
        layer = qwen_layer(name, layout, placement)
        for mode in layout.modes:
            layer.bind(layout.place(mode, layout.world_size - 1))
            for num_tokens in (1, 64, 8192):
                routed = Routed(
                    torch.empty(num_tokens, 2048, dtype=torch.bfloat16, device=META),
                    torch.empty(num_tokens, 8, dtype=torch.int64, device=META),
                    torch.empty(num_tokens, 8, dtype=torch.bfloat16, device=META),
                )
                with torch.inference_mode(), assume("meta", capability), CaptureChecker(META):
                    assert layer.compute(routed).shape == (num_tokens, 2048)


def test_without_the_kernel_a_host_read_is_found() -> None:
    layer = qwen_layer("AWQ", Layout(Mode(1, 1)), "replicate")
    layer.bind(Layout(Mode(1, 1)).place(Mode(1, 1), 0))
    routed = Routed(
        torch.empty(2, 2048, dtype=torch.bfloat16, device=META),
        torch.empty(2, 8, dtype=torch.int64, device=META),
        torch.empty(2, 8, dtype=torch.bfloat16, device=META),
    )
    with pytest.raises(CaptureError, match=r"copies from meta to cpu .*grouped\.py"), CaptureChecker(META):
        layer.compute(routed)
