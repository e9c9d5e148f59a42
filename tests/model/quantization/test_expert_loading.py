"""Loading quantised experts: what a rank reads and keeps, what the plan says of it, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import make_checkpoint
from tests.model.quantization.checkpoints import FORMATS, change_config, fp8_block
from tests.model.quantization.mixtures import FILE, MIXTURES, apart, make_mixture
from tests.model.test_checkpoint import CountingSource
from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import CheckpointError
from ulysses_infer.model.experts import expert_sizes
from ulysses_infer.model.experts.keys import ExpertKeys, ExpertTensor
from ulysses_infer.model.loading.files import MemorySource, SafetensorsSource
from ulysses_infer.model.loading.weights import Weights
from ulysses_infer.model.model import ModelBuilder, build_empty_model
from ulysses_infer.model.quantization.formats import read_quantization
from ulysses_infer.model.quantization.layers import mark_quantised
from ulysses_infer.parallel.layout import Layout, Mode

CPU = torch.device("cpu")
PLACEMENTS = ["replicate", "expert", "width"]
MODELS = Path("configs/models")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`checkpoint(name)`: the folder of a mixture, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_mixture(made[name], MIXTURES[name])
        return made[name]

    return get


def blueprint(folder: Path, base: Mode, shard: int, placement: str, **options: Any) -> ModelBuilder:
    settings = ModelConfig(path=str(folder))
    return ModelBuilder.from_folder(folder, settings, Layout(base), shard, CPU, expert_placement=placement, **options)


def rewrite(folder: Path, target: Path, /, **tensors: torch.Tensor | None) -> None:
    """The checkpoint `folder` in `target`, with other tensors; None leaves one out."""
    (target / "config.json").write_text((folder / "config.json").read_text())
    changed = {name: t for name, t in {**load_file(folder / FILE), **tensors}.items() if t is not None}
    save_file(changed, target / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["qwen3-fp8", "qwen3-awq", "llama4-fbgemm", "gpt-oss-mxfp4"])
@pytest.mark.parametrize("placement", ["replicate", "expert", "width"])
def test_what_is_read_is_what_is_kept_and_what_the_plan_says(name: str, placement: str, checkpoint: Any) -> None:
    folder = checkpoint(name)
    for base, shard in ((Mode(2, 1), 1), (Mode(1, 2), 0)):
        plan = blueprint(folder, base, shard, placement)
        source = CountingSource(SafetensorsSource(folder))
        plan.loader(source).load()
        stored = {n: p for n, p in plan.injection.model.named_parameters() if ".experts." in n}
        assert plan.expert_bytes == sum(p.numel() * p.element_size() for p in stored.values())
        narrow = {torch.float8_e4m3fn, torch.int32, torch.uint8}
        assert {p.dtype for n, p in stored.items() if p.dim() > 2 and "scale" not in n} <= narrow
        widened = sum(2 * p.numel() for p in plan.injection.model.parameters() if p.dtype == torch.float32)
        assert source.bytes <= plan.weight_bytes <= source.bytes + widened, "scales of 16 bits are kept in 32"


def test_a_rank_reads_no_expert_that_it_does_not_keep(checkpoint: Any) -> None:
    folder = checkpoint("qwen3-fp8")
    bytes_read = {}
    for placement in PLACEMENTS:
        source = CountingSource(SafetensorsSource(folder))
        blueprint(folder, Mode(2, 1), 0, placement).loader(source).load()
        bytes_read[placement] = source.bytes
    weights = 4 * 3 * 44 * 64 * 2  # experts, projections, values; layers
    for placement in ("expert", "width"):
        assert bytes_read["replicate"] - bytes_read[placement] > 0.98 * weights / 2


@pytest.mark.parametrize("name", MIXTURES)
def test_sizes_before_injection_are_those_of_what_is_stored(name: str, checkpoint: Any) -> None:
    """The sizes by which `expert_placement: auto` chooses."""
    folder = checkpoint(name)
    plan = blueprint(folder, Mode(1, 1), 0, "replicate")
    config = type(plan.injection.model.config).from_pretrained(folder)
    empty = build_empty_model(config, plan.dtype)
    mark_quantised(empty, read_quantization(config, SafetensorsSource(folder).keys))
    sizes = expert_sizes(empty)
    assert (sizes.num_experts, sizes.expert_bytes) == (4, plan.expert_bytes)
    assert sizes.other_bytes == plan.weight_bytes - plan.expert_bytes


@pytest.mark.thorough
def test_a_public_mixture_takes_its_published_bytes() -> None:
    """Qwen3-30B-A3B-FP8 has 30.5 billion weights, 31.2 GB of files."""
    from transformers import CONFIG_MAPPING

    values = json.loads((MODELS / "qwen3-30b-a3b.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    config = CONFIG_MAPPING[values["model_type"]](**values, quantization_config=quantization)
    plan = ModelBuilder(config, dict, ModelConfig(path="-"), Layout(Mode(1, 1)), 0, CPU)
    assert plan.weight_bytes / 1e9 == pytest.approx(31.2, rel=0.01)


def test_auto_counts_the_bytes_of_quantised_experts(checkpoint: Any) -> None:
    folder = checkpoint("qwen3-fp8")
    need = 2 * blueprint(folder, Mode(1, 1), 0, "replicate").weight_bytes  # weights may take half of the memory
    chosen = [blueprint(folder, Mode(2, 1), 0, "auto", memory=m).injection.expert_placement for m in (need, need - 2)]
    assert chosen == ["replicate", "expert"]
    assert blueprint(folder / "dense", Mode(2, 1), 0, "auto", memory=need).injection.expert_placement == "expert"


def test_the_checkpoint_must_be_what_its_config_says(checkpoint: Any, tmp_path: Path) -> None:
    folder, name = checkpoint("qwen3-fp8"), "model.layers.1.mlp.experts.2.up_proj"
    scale = load_file(folder / FILE)[f"{name}.weight_scale_inv"]

    def refusal(**tensors: torch.Tensor | None) -> str:
        rewrite(folder, tmp_path, **tensors)
        with pytest.raises(CheckpointError) as caught:
            blueprint(tmp_path, Mode(1, 1), 0, "replicate").load()
        return str(caught.value)

    assert "has 3 tensors like model.layers.1.mlp.experts.0.up_proj.weight_scale_inv" in refusal(
        **{f"{name}.weight_scale_inv": None}
    )
    assert f"{name}.weight_scale_inv has shape" in refusal(**{f"{name}.weight_scale_inv": scale[:, :2].contiguous()})
    assert "is stored as float32" in refusal(**{f"{name}.weight": torch.randn(44, 64)})
    assert "is stored as uint8" in refusal(**{f"{name}.weight_scale_inv": scale.to(torch.uint8)})
    assert f"the checkpoint has {name}.weight_zero_point" in refusal(**{f"{name}.weight_zero_point": torch.ones(1)})
    every = {f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": None for i in range(2) for e in range(4)}
    assert "lacks 2 of" in refusal(**every)


def test_experts_that_the_config_spares_must_be_plain(checkpoint: Any, tmp_path: Path) -> None:
    rewrite(checkpoint("qwen3-fp8"), tmp_path)
    quantization = {**MIXTURES["qwen3-fp8"].format.config, "modules_to_not_convert": [r".*experts.*"]}
    change_config(tmp_path, quantization_config=quantization)
    with pytest.raises(CheckpointError, match="stored as float8_e4m3fn, but the checkpoint's quantization_config"):
        blueprint(tmp_path, Mode(1, 1), 0, "replicate").load()


def test_weights_can_be_checked_and_written_again(checkpoint: Any) -> None:
    folder = checkpoint("gpt-oss-mxfp4")
    plan = blueprint(folder, Mode(2, 1), 1, "width")
    weights = Weights(plan, plan.load(), are_borrowed=False)
    tensors = load_file(folder / FILE)
    name = "model.layers.1.mlp.experts.down_proj"
    weights.check(SafetensorsSource(folder))
    weights.drop()
    weights.write(MemorySource({**tensors, f"{name}_scales": tensors[f"{name}_scales"] + 1}))
    parameters = dict(plan.injection.model.named_parameters())
    assert torch.equal(parameters[f"{name}.scales"], tensors[f"{name}_scales"][:, :, 1:] + 1)
    assert torch.equal(parameters[f"{name}.blocks"], tensors[f"{name}_blocks"][:, :, 1:])


def test_a_prefix_of_the_checkpoint_is_taken_off(checkpoint: Any) -> None:
    """As transformers does for the dense weights of a model saved without its head, or inside another."""
    plan = blueprint(checkpoint("qwen3-fp8"), Mode(1, 1), 0, "replicate")
    loader = plan.loader(MemorySource({}))
    keys: ExpertKeys = loader.expert_keys
    found = keys.find("layers.1.mlp.experts.3.down_proj.weight_scale_inv", loader.names.rename)
    assert found == ExpertTensor("model.layers.1.mlp.experts.down_proj", "weight_scale_inv", 3)
    assert keys.find("model.layers.9.mlp.experts.3.down_proj.weight", loader.names.rename) is None
    assert keys.find("model.layers.1.self_attn.q_proj.weight", loader.names.rename) is None


def test_experts_of_a_multimodal_checkpoint_are_found(tmp_path: Path) -> None:
    """Under the prefix that Llama 4's files have, one by one, where transformers has no conversion for them."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    vision = dict.fromkeys(("hidden_size", "projector_input_dim", "projector_output_dim", "vision_output_dim"), 32)
    vision |= {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = Llama4Config(text_config=tiny_config("llama4_text").to_dict(), vision_config=vision)
    Llama4ForConditionalGeneration(config).save_pretrained(tmp_path)
    chosen = FORMATS["compressed-channel"]
    stored = dict[str, torch.Tensor]()
    for key, tensor in apart(load_file(tmp_path / FILE)).items():
        stem, _, leaf = key.rpartition(".")
        found = chosen.quantise(tensor)[0] if ".experts." in key else {leaf: tensor}
        stored |= {f"{stem}.{name}": part.contiguous() for name, part in found.items()}
    save_file(stored, tmp_path / FILE, metadata={"format": "pt"})
    ignored = ["re:.*self_attn.*", "re:.*shared_expert.*", "re:.*lm_head", "re:vision_model.*"]
    change_config(tmp_path, quantization_config={**chosen.config, "ignore": ignored})
    plan = blueprint(tmp_path, Mode(2, 1), 1, "expert")
    plan.load()
    (name, matrix), *_ = plan.loader(MemorySource({})).expert_keys.matrices.items()
    assert name.endswith("layers.0.feed_forward.experts.gate_proj")
    key = "language_model.model.layers.0.feed_forward.experts.2.gate_proj.weight"
    assert torch.equal(matrix.get_parameter("weight")[0].view(torch.uint8), stored[key].view(torch.uint8))


@pytest.mark.parametrize("name", ["qwen3-fp8", "gpt-oss-mxfp4"])
def test_transformers_reads_the_same_from_the_quantised_files(name: str, tmp_path: Path) -> None:
    """On a CPU it makes FP8 and MXFP4 dense as it loads them: the checkpoints of these tests are what it expects."""
    from transformers import AutoModelForCausalLM

    mixture = MIXTURES[name]
    if name == "qwen3-fp8":  # it asks for blocks that divide the weights
        config = {**mixture.format.config, "weight_block_size": [4, 4]}
        mixture = replace(mixture, format=replace(mixture.format, config=config, quantise=fp8_block((4, 4))))
    dense = make_mixture(tmp_path, mixture)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (key, ours), (_, other) in zip(dense.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(ours, other, msg=key)


def test_plain_experts_beside_quantised_layers_load(tmp_path: Path) -> None:
    make_checkpoint(tiny_config("qwen3_moe"), tmp_path)
    spared = ["self_attn", "lm_head", r".*experts", r".*self_attn.*"]
    change_config(tmp_path, quantization_config={"quant_method": "gptq", "modules_to_not_convert": spared})
    blueprint(tmp_path, Mode(2, 1), 0, "expert").load()
