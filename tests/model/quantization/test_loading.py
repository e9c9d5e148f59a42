"""Loading a quantised checkpoint: what is kept, how much of it, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import make_checkpoint
from tests.model.quantization.checkpoints import FORMATS, change_config, make_quantised
from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import CheckpointError, UlyssesError, UnsupportedModelError
from ulysses_infer.model.loading.files import MemorySource, SafetensorsSource
from ulysses_infer.model.loading.weights import Weights
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.parallel.layout import Layout, Mode

CPU = torch.device("cpu")
SINGLE = Mode(1, 1)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "attention_bias": False, "mlp_bias": False}


def blueprint(folder, base=SINGLE, shard=0, **model):
    return ModelBuilder.from_folder(folder, ModelConfig(path=str(folder), **model), Layout(base), shard, CPU)


def refusal(folder, error, **model):
    with pytest.raises(UlyssesError) as caught:
        blueprint(folder, **model).load()
    assert isinstance(caught.value, error)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder, **tensors):
    """Other tensors in a checkpoint; None takes one out."""
    path = folder / "model.safetensors"
    changed = {name: t for name, t in {**load_file(path), **tensors}.items() if t is not None}
    save_file(changed, path, metadata={"format": "pt"})


def layer_bytes(model):
    """Bytes of the decoder layers' quantised linears."""
    layers = [m for m in model.module.modules() if isinstance(m, QuantizedLinear)]
    return sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())


@pytest.mark.parametrize(("name", "share"), [("compressed-channel", 1.02), ("gptq", 0.79), ("awq", 0.79)])
def test_weights_stay_as_small_as_they_are_stored(tmp_path, name, share):
    """One byte per FP8 value, half a byte per 4-bit value plus its groups of 16; each once, for all modes."""
    model = make_quantised(tiny_config("llama", **WIDE), tmp_path, FORMATS[name])
    layers = [m for n, m in model.named_modules() if type(m) is torch.nn.Linear and "layers" in n]
    values = sum(layer.weight.numel() for layer in layers)
    plan = blueprint(tmp_path, Mode(4, 1), 1)
    loaded = plan.load()
    assert plan.weight_bytes == loaded.weight_bytes
    assert layer_bytes(loaded) <= share * values
    before = layer_bytes(loaded)
    for mode in Layout(Mode(4, 1)).modes:
        loaded.injection.bind(Layout(Mode(4, 1)).place(mode, 1))
        assert layer_bytes(loaded) == before
    halves = [layer_bytes(blueprint(tmp_path, Mode(2, 2), shard).load()) for shard in range(4)]
    assert all(half < 0.55 * before for half in halves), "a base slice is a share, blocks rounded up"


def test_parameters_keep_the_dtype_of_the_checkpoint(tmp_path):
    make_quantised(tiny_config("llama"), tmp_path, FORMATS["fp8-block"])
    loaded = blueprint(tmp_path, dtype="bfloat16").load()
    layer = loaded.module.model.layers[0].mlp.up_proj
    dtypes = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    assert dtypes == {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32, "bias": torch.bfloat16}


def test_the_checkpoint_must_be_what_its_config_says(tmp_path):
    make_quantised(tiny_config("llama"), tmp_path, FORMATS["fp8-block"])
    name = "model.layers.1.mlp.up_proj"
    good = load_file(tmp_path / "model.safetensors")
    scale = good[f"{name}.weight_scale_inv"]
    rewrite(tmp_path, **{f"{name}.weight_scale_inv": scale[:, :3].contiguous()})
    assert f"{name}.weight_scale_inv has shape" in refusal(tmp_path, CheckpointError)
    rewrite(tmp_path, **{f"{name}.weight_scale_inv": None})
    assert "lacks 1 of" in refusal(tmp_path, CheckpointError)
    rewrite(tmp_path, **{f"{name}.weight_scale_inv": scale, f"{name}.weight": good[f"{name}.weight"].float()})
    assert f"{name}.weight is stored as float32" in refusal(tmp_path, CheckpointError)
    rewrite(tmp_path, **good, **{f"{name}.weight_zero_point": torch.ones(1)})
    assert f"the checkpoint has {name}.weight_zero_point" in refusal(tmp_path, CheckpointError)
    rewrite(tmp_path, **{f"{name}.weight_zero_point": torch.zeros(1)})
    blueprint(tmp_path).load()


def test_a_layer_that_the_config_spares_must_be_plain(tmp_path):
    make_quantised(tiny_config("llama"), tmp_path, FORMATS["fp8-block"])
    change_config(tmp_path, quantization_config={**FORMATS["fp8-block"].config, "modules_to_not_convert": ["up_proj"]})
    assert "up_proj.weight is stored as float8_e4m3fn" in refusal(tmp_path, CheckpointError)


def test_zero_biases_that_the_model_has_no_place_for_change_nothing(tmp_path):
    make_quantised(tiny_config("llama", attention_bias=False, mlp_bias=False), tmp_path, FORMATS["gptq"])
    rewrite(tmp_path, **{"model.layers.0.mlp.up_proj.bias": torch.zeros(88)})
    blueprint(tmp_path).load()
    rewrite(tmp_path, **{"model.layers.0.mlp.up_proj.bias": torch.ones(88)})
    assert "up_proj.bias" in refusal(tmp_path, CheckpointError)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt_oss", "the experts model.layers.0.mlp.experts have biases and are quantized by fp8 one by one"),
        ("gpt2", "Conv1D"),
    ],
)
def test_layers_that_cannot_be_sliced_are_refused_by_name(tmp_path, family, words):
    make_checkpoint(tiny_config(family), tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert words in refusal(tmp_path, UnsupportedModelError)


def test_a_quantised_head_is_refused(tmp_path):
    make_quantised(tiny_config("llama"), tmp_path, FORMATS["compressed-channel"])
    change_config(tmp_path, quantization_config={**FORMATS["compressed-channel"].config, "ignore": []})
    assert "lm_head (vocabulary head) is quantized" in refusal(tmp_path, UnsupportedModelError)


def test_weights_can_be_checked_and_written_again(tmp_path):
    make_quantised(tiny_config("llama"), tmp_path / "a", FORMATS["fp8-block"])
    plan = blueprint(tmp_path / "a", Mode(2, 1), 1)
    model = plan.load()
    weights = Weights(plan, model, are_borrowed=False)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"
    doubled = MemorySource({**tensors, name: tensors[name] * 2})
    weights.check(SafetensorsSource(tmp_path / "a"))
    weights.drop()
    weights.write(doubled)
    assert torch.equal(model.module.get_parameter(name), (tensors[name] * 2).float())
    assert torch.equal(
        model.module.get_parameter("model.layers.1.mlp.down_proj.weight").view(torch.uint8),
        tensors["model.layers.1.mlp.down_proj.weight"].view(torch.uint8),
    )
