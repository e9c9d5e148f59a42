"""`quantization_config`: what is read, which layers it means, and what is refused by name."""

from __future__ import annotations

import pytest
import torch

from tests.model.quantization.checkpoints import FORMATS, compressed_config
from tests.model.quantization.mixtures import MIXTURES
from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.quantization.formats import READERS, read_quantization
from ulysses_infer.model.quantization.mxfp4 import Mxfp4Weight
from ulysses_infer.model.quantization.packed import AwqWeight, CompressedWeight, GptqWeight
from ulysses_infer.model.quantization.scaled import ScaledWeight, TransposedScaledWeight

UP = "model.layers.3.mlp.up_proj"


class Config:
    """The part of a transformers config that is read."""

    def __init__(self, given):
        self.quantization_config = given


def read(given, keys=()):
    return read_quantization(Config(given), lambda: keys)


def test_a_plain_checkpoint_has_none():
    assert read(None) is None
    assert read_quantization(object(), list) is None


@pytest.mark.parametrize(
    ("given", "scheme"),
    [
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, ScaledWeight("weight_scale_inv", "block", (64, 128))),
        ({"quant_method": "fp8"}, ScaledWeight("weight_scale", "tensor")),
        (FORMATS["fbgemm"].config, ScaledWeight("weight_scale", "channel")),
        (FORMATS["compressed-int8"].config, ScaledWeight("weight_scale", "channel", dtype=torch.int8)),
        (FORMATS["compressed-int4-zeros"].config, CompressedWeight(16, symmetric=False)),
        ({"quant_method": "awq", "bits": 4}, AwqWeight(128)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}, GptqWeight(64, 4, True)),
        ({"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}, GptqWeight(128, 8, zero_offset=0)),
    ],
)
def test_a_layer_is_stored_as_the_config_says(given, scheme):
    assert read(given).scheme_of(UP) == scheme


def test_the_name_of_a_single_scale_is_the_checkpoints():
    assert read({"quant_method": "fp8"}, [f"{UP}.weight_scale_inv"]).scheme_of(UP).scale_name == "weight_scale_inv"


def test_an_object_is_read_like_its_dictionary():
    from transformers import FineGrainedFP8Config

    given = FineGrainedFP8Config(weight_block_size=(64, 32), modules_to_not_convert=["up_proj"])
    assert read(given).scheme_of(UP) is None
    assert read(given).scheme_of(UP.replace("up", "down")).block == (64, 32)


@pytest.mark.parametrize(
    ("given", "spared"),
    [
        ({"quant_method": "fp8", "modules_to_not_convert": [UP]}, True),
        ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.3"]}, True),
        ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.33", "proj_up", "gate"]}, False),
        ({"quant_method": "awq", "modules_to_not_convert": ["up_proj"]}, True),
        ({"quant_method": "gptq", "dynamic": {"-:.*mlp.up.*": {}}}, True),
        ({"quant_method": "gptq", "dynamic": {"-:mlp": {}, r"-:.*mlp\.gate$": {}}}, False),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*.mlp.*"]}, True),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "model.layers.3"]}, True),
        ({**compressed_config("float-quantized", type="float"), "ignore": ["re:.*mlp.*"]}, True),
        ({**compressed_config("float-quantized", type="float"), "ignore": [UP]}, True),
        ({**compressed_config("float-quantized", type="float"), "ignore": ["up_proj", "re:mlp"]}, False),
    ],
)
def test_lists_of_names_spare_layers(given, spared):
    assert (read(given).scheme_of(UP) is None) == spared


def test_groups_of_a_config_each_have_their_targets():
    given = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "a": {
                "targets": ["re:.*mlp.*"],
                "format": "pack-quantized",
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
            },
            "b": {
                "targets": ["model.layers.0.self_attn.q_proj"],
                "format": "float-quantized",
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            },
        },
    }
    quantization = read(given)
    assert quantization.scheme_of(UP) == CompressedWeight(32)
    assert quantization.scheme_of("model.layers.0.self_attn.q_proj") == ScaledWeight("weight_scale", "channel")
    assert quantization.scheme_of("model.layers.0.self_attn.k_proj") is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized by bitsandbytes; this engine reads awq, "),
        ({"quant_method": "fp_quant"}, "quantized by fp_quant"),
        ({"load_in_8bit": True}, "a method it does not name"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4'"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 8}, "'bits': 8"),
        ({"quant_method": "gptq", "bits": 3}, "bits 3"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        (compressed_config("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group"), "nvfp4"),
        (compressed_config("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False), "asymmetric"),
        (compressed_config("marlin-24", num_bits=4, type="int", strategy="group", group_size=128), "marlin-24"),
        (
            {**compressed_config("float-quantized", type="float"), "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity 'sparse-24-bitmask'",
        ),
    ],
)
def test_unsupported_settings_are_refused_by_name_in_one_line(given, words):
    with pytest.raises(UnsupportedModelError) as caught:
        read(given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


EXPERTS = "model.layers.3.mlp.experts"


@pytest.mark.parametrize("has_gate", [True, False])
def test_each_projection_of_the_experts_has_the_scheme_of_a_linear_layer(has_gate):
    found = read(FORMATS["awq"].config).experts_of(EXPERTS, has_gate)
    ups = ["gate_proj", "up_proj"] if has_gate else ["up_proj"]
    assert dict(found.schemes) == dict.fromkeys([*ups, "down_proj"], AwqWeight(16))
    assert found.suffixes is None


@pytest.mark.parametrize(
    ("given", "scheme", "names"),
    [
        ({"quant_method": "mxfp4"}, Mxfp4Weight(), {"_blocks", "_scales"}),
        ({"quant_method": "fbgemm_fp8"}, TransposedScaledWeight(), {"", "_scale"}),
    ],
)
def test_experts_in_one_tensor_are_two_matrices(given, scheme, names):
    found = read(given).experts_of(EXPERTS, has_gate=True)
    assert dict(found.schemes) == {"gate_up_proj": scheme, "down_proj": scheme}
    assert set(found.suffixes.values()) == names
    assert read({**given, "modules_to_not_convert": [EXPERTS]}).experts_of(EXPERTS, has_gate=True) is None


def test_mxfp4_is_for_experts_only():
    assert read({"quant_method": "mxfp4"}).scheme_of(UP) is None


@pytest.mark.parametrize("spared", ["re:.*experts.*", "re:.*mlp.*"])
def test_experts_may_be_spared(spared):
    given = {**compressed_config("float-quantized", type="float"), "ignore": [spared]}
    assert read(given).experts_of(EXPERTS, has_gate=True) is None


def test_experts_that_are_quantised_in_part_are_refused():
    given = {**compressed_config("float-quantized", type="float"), "ignore": ["re:.*experts.*down_proj"]}
    with pytest.raises(UnsupportedModelError, match=r"mlp.experts are quantized by .*, but not their down"):
        read(given).experts_of(EXPERTS, has_gate=True)


def test_every_method_has_a_checkpoint_in_the_tests():
    chosen = [*FORMATS.values(), *(mixture.format for mixture in MIXTURES.values())]
    assert {one.config["quant_method"] for one in chosen} == set(READERS)
