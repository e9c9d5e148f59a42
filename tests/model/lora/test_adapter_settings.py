"""Every setting of PEFT's LoraConfig gives PEFT's own output or a refusal with its name, its value and a remedy."""

from __future__ import annotations

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig

from tests.equivalence.tiny_models import make_checkpoint, token_logprobs
from tests.tiny import settings, tiny_config
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import CheckpointError
from ulysses_infer.model.lora.adapter import read_adapter
from ulysses_infer.model.lora.settings import check_settings

PROMPT = [(7 * i * i + 3 * i + 1) % 97 for i in range(24)]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SERVED = {
    "plain": {},
    "of training or storage": {
        "lora_dropout": 0.3,
        "task_type": None,
        "inference_mode": True,
        "revision": "main",
        "base_model_name_or_path": "somewhere/else",
        "peft_version": "0.5.0",
        "auto_mapping": None,
        "fan_in_fan_out": True,
        "megatron_core": "other.core",
        "qalora_group_size": 8,
        "ensure_weight_tying": True,
        "modules_to_save": [],
        "alora_invocation_tokens": [],
        "runtime_config": peft.LoraRuntimeConfig(ephemeral_gpu_offload=True),
    },
    "configs of other initialisations": {
        "loftq_config": {"loftq_bits": 4},
        "eva_config": peft.EvaConfig(),
        "corda_config": CordaConfig(),
        "lora_ga_config": peft.LoraGAConfig(),
    },
    "random": {"init_lora_weights": False, "r": 3, "lora_alpha": 5},
    "gaussian": {"init_lora_weights": "gaussian", "use_rslora": True},
    "eva": {"init_lora_weights": "eva"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "patterns": {
        "rank_pattern": {"layers.1.mlp.down_proj": 5, "^model.layers.0.self_attn.q_proj": 2, "k_proj|v_proj": 3},
        "alpha_pattern": {"mlp.*": 3, "layers.1.mlp.down_proj": 50, "proj": 7, "k_proj|v_proj": 11},
        "target_modules": "all-linear",
    },
    "patterns, rank-stabilized": {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 2.5}, "use_rslora": True},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "exclusions": {"exclude_modules": ["layers.0.self_attn.q_proj", "v_proj"], "target_modules": ALL},
    "an expression": {"target_modules": r".*layers\.1\.(self_attn\.[qk]|mlp\.up)_proj"},
    "velora": {"velora_config": peft.VeloraConfig(num_groups=4)},
    "monteclora": {"monteclora_config": peft.MontecloraConfig()},
}

MERGED, CONVERTED, RETRAINED = "merge_and_unload", "path_initial_model_for_weight_conversion", "as an ordinary LoRA"
REFUSED = [
    ("init_lora_weights", "pissa", CONVERTED),
    ("init_lora_weights", "pissa_niter_16", CONVERTED),
    ("init_lora_weights", "olora", CONVERTED),
    ("init_lora_weights", "corda", CONVERTED),
    ("init_lora_weights", "lora_ga", CONVERTED),
    ("init_lora_weights", "loftq", "set init_lora_weights to true"),
    ("init_lora_weights", "new", "is unknown; known: true, false, gaussian"),
    ("bias", "all", MERGED),
    ("bias", "lora_only", MERGED),
    ("modules_to_save", ["lm_head"], MERGED),
    ("use_dora", True, MERGED),
    ("lora_bias", True, MERGED),
    ("layer_replication", [[0, 2], [1, 2]], MERGED),
    ("trainable_token_indices", [3], MERGED),
    ("target_parameters", ["experts.down_proj"], MERGED),
    ("use_bdlora", {"nblocks": 2}, MERGED),
    ("kasa_config", {"beta": 1e-4}, MERGED),
    ("alora_invocation_tokens", [5, 6], RETRAINED),
    ("arrow_config", {"top_k": 3}, RETRAINED),
    ("megatron_config", {"hidden_size": 64}, RETRAINED),
    ("use_qalora", True, RETRAINED),
    ("r", 0, "positive number"),
    ("r", 2.5, "positive number"),
    ("lora_alpha", "8", "positive number"),
    ("rank_pattern", {"q_proj": None}, "positive number for 'q_proj'"),
    ("alpha_pattern", ["q_proj"], "must map"),
    ("alpha_pattern", {"(": 3}, "regular expression"),
    ("setting_of_a_later_version", 0.5, "is unknown; remove it .* merge_and_unload"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By adapter: the log-probabilities of the prompt by PEFT and by the engine; None: the model's own."""
    root = tmp_path_factory.mktemp("settings")
    model = make_checkpoint(tiny_config(vocab_size=101), root / "model")
    expected = {None: token_logprobs(model, torch.tensor([PROMPT]))}
    folders = {}
    for name, changes in SERVED.items():
        folders[name] = str(root / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's own, of settings without effect
            save_adapter(load(model, root), changes, folders[name])
            loaded = peft.PeftModel.from_pretrained(load(model, root), folders[name]).eval()
        expected[name] = token_logprobs(loaded, torch.tensor([PROMPT]))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with init_inference(str(root / "model"), **settings(**{"lora.adapters": folders})) as engine:
        outputs = engine.generate([PROMPT] * len(expected), params, adapter=list(expected))
    served = [[o.prompt_logprobs[i][PROMPT[i]].logprob for i in range(1, len(PROMPT))] for o in outputs]
    return {name: (expected[name], values) for name, values in zip(expected, served, strict=True)}


def load(model, root):
    return type(model).from_pretrained(root / "model", dtype=torch.float32)


def save_adapter(model, changes, folder):
    """A random adapter with PEFT's settings."""
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ALL, **changes})
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(folder)


@pytest.mark.parametrize("name", SERVED)
def test_settings_are_served_as_peft_applies_them(found, name):
    expected, served = found[name]
    assert served == pytest.approx(expected, abs=1e-4)
    assert served != pytest.approx(found[None][1], abs=1e-2), "the adapter changes the output"


@pytest.mark.parametrize(("field", "value", "remedy"), REFUSED)
def test_other_settings_are_refused_by_name_with_value_and_remedy(field, value, remedy):
    with pytest.raises(CheckpointError, match=rf"^adapter 'a': {field}=.*{remedy}") as caught:
        check_settings("a", {**peft.LoraConfig().to_dict(), "peft_type": "LORA", field: value})
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_setting_of_the_installed_peft_is_covered():
    covered = {key for changes in SERVED.values() for key in changes} | {field for field, _, _ in REFUSED}
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - covered == {"peft_type"}


@pytest.mark.parametrize("kind", [kind.value for kind in peft.PeftType if kind.value != "LORA"])
def test_other_types_are_refused_by_name(kind):
    with pytest.raises(CheckpointError, match=rf"is of type {kind}; only LORA can be served: merge it"):
        check_settings("a", {"peft_type": kind})


def test_unknown_settings_without_a_value_are_ignored():
    for value in (None, False, [], {}, 0):
        check_settings("a", {"peft_type": "LORA", "setting_of_a_later_version": value})


def test_an_adapter_converted_from_pissa_is_an_ordinary_one(tmp_path):
    model = make_checkpoint(tiny_config(vocab_size=101), tmp_path / "model")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "initial")
    initial = json.loads((tmp_path / "initial" / "adapter_config.json").read_text())
    (tmp_path / "initial" / "adapter_config.json").write_text(json.dumps({**initial, "init_lora_weights": True}))
    wrapped.save_pretrained(tmp_path / "as it is")
    with pytest.raises(CheckpointError, match="init_lora_weights='pissa'"):
        read_adapter("a", tmp_path / "as it is")
    wrapped.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial")
    layers = read_adapter("a", tmp_path / "converted").layers
    assert {len(layer.down) for layer in layers.values()} == {8}
    change = sum(float((layer.up @ layer.down).abs().max()) for layer in layers.values())
    assert change == pytest.approx(0, abs=1e-5), "nothing was trained"
