"""`model.hf_overrides`: spellings, effects on transformers' config, and errors."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.config import ModelConfig, load_config, resolved_yaml
from ulysses_infer.engine.profile_key import profile_key
from ulysses_infer.errors import CheckpointError, ConfigError
from ulysses_infer.model.layers.rotary import choose_max_model_len, max_supported_len
from ulysses_infer.model.loading.hf_overrides import ROPE_KINDS, overridden
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.parallel.layout import Layout, Mode

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
HALF = 64  # rotary frequencies of phi3's heads of 128
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({}, 40960),
    "linear": ({"factor": 2.0}, 81920),
    "dynamic": ({"factor": 2.0}, 81920),
    "yarn": ({"factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
    "longrope": (
        {
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * HALF,
            "long_factor": [2.0] * HALF,
        },
        40960,
    ),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        40960,
    ),
    "proportional": ({"partial_rotary_factor": 0.5}, 40960),
}
"""The longest text of a model of 40960 positions under each rotary embedding."""


def qwen3(**changes: Any) -> Any:
    """A config as of the public Qwen3 models."""
    from transformers import Qwen3Config

    return Qwen3Config(**{"max_position_embeddings": 40960, "rope_theta": 1e6, **changes})


def of(model_type: str, **values: Any) -> Any:
    """transformers' default config of that model type."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**values)


def complaint(config: Any, overrides: dict[str, Any]) -> str:
    """The one line that the overrides are refused with."""
    with pytest.raises(ConfigError) as caught:
        overridden(config, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def served(folder: str, overrides: dict[str, Any]) -> Any:
    """An engine of one rank."""
    changes: dict[str, Any] = {"model.hf_overrides": overrides}
    return init_inference(folder, **settings(**changes))


# -- how it is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ['model.hf_overrides={"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}'],
        ["model.hf_overrides.rope_parameters={rope_type: yarn, factor: 4.0}"],
        ["model.hf_overrides.rope_parameters.rope_type=yarn", "model.hf_overrides.rope_parameters.factor=4.0"],
        ["--hf-overrides", '{"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}'],
        ['--hf-overrides={"rope_parameters": {"rope_type": "yarn"}}', "model.hf_overrides.rope_parameters.factor=4.0"],
    ],
)
def test_keys_may_be_nested_dotted_or_vllms_json(arguments: list[str]) -> None:
    config = load_config({"model.path": "m"}, arguments)
    assert config.model.hf_overrides == {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}


def test_a_dotted_key_changes_one_value_of_the_recipe_and_leaves_the_others() -> None:
    recipe = {"model": {"path": "m", "hf_overrides": {"rope_parameters": YARN, "rms_norm_eps": 1e-5}}}
    found = load_config(recipe, ["model.hf_overrides.rope_parameters.factor=2.0"]).model.hf_overrides
    assert found == {"rope_parameters": {**YARN, "factor": 2.0}, "rms_norm_eps": 1e-5}


def test_the_resolved_recipe_contains_the_overrides() -> None:
    config = load_config({"model.path": "m", "hf_overrides": {"rope_parameters": YARN}})
    assert "original_max_position_embeddings: 32768" in resolved_yaml(config)
    assert load_config(config) == config


@pytest.mark.parametrize("value", ["3", "yarn", "[1]"])
def test_a_value_that_is_not_a_mapping_gives_a_one_line_error(value: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.hf_overrides"):
        load_config({"model.path": "m"}, [f"--hf-overrides={value}"])


def test_keys_below_plain_values_stay_unknown() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'lora\.adapters\.a\.b'"):
        load_config({"model.path": "m"}, ["lora.adapters.a.b=c"])


# -- what they change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_both_spellings_set_yarn_and_keep_the_checkpoints_theta(name: str, kind: str) -> None:
    values = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = qwen3()
    changed = overridden(config, {name: values})
    assert changed.rope_parameters == {**YARN, "rope_theta": 1e6}
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}, "the given config was changed"


def test_a_key_alone_changes_the_rotary_embedding_the_checkpoint_has() -> None:
    config = qwen3(rope_parameters={**YARN, "rope_theta": 1e6})
    assert overridden(config, {"rope_parameters": {"factor": 2.0}}).rope_parameters["factor"] == 2.0
    assert max_supported_len(overridden(config, {"rope_parameters": {"factor": 2.0}})) == 65536


def test_another_rope_type_replaces_all_parameters() -> None:
    config = of(
        "llama",
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **KINDS["llama3"][0]},
        max_position_embeddings=131072,
    )
    assert overridden(config, {"rope_parameters": YARN}).rope_parameters == {**YARN, "rope_theta": 5e5}
    plain = overridden(config, {"rope_parameters": {"rope_type": "default"}})
    assert plain.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize("given", [YARN, {"full_attention": YARN}])
def test_overrides_apply_to_full_attention_layers_if_rope_differs_per_layer_type(given: Any) -> None:
    before = of("olmo3")
    changed = overridden(before, {"rope_parameters": given}).rope_parameters
    assert changed["full_attention"]["factor"] == 4.0
    assert changed["sliding_attention"] == before.rope_parameters["sliding_attention"]


@pytest.mark.parametrize("overrides", [{"rope_parameters": YARN}, {"text_config": {"rope_parameters": YARN}}])
def test_overrides_apply_to_the_language_model_of_a_vision_language_model(overrides: Any) -> None:
    changed = overridden(of("gemma3"), overrides)
    assert changed.text_config.rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert max_supported_len(changed.text_config) == 131072


def test_fewer_layers_keep_the_first_ones(folder: str) -> None:
    overrides = {"num_hidden_layers": 1}
    changed = overridden(qwen3(num_hidden_layers=4), overrides)
    assert (changed.num_hidden_layers, len(changed.layer_types)) == (1, 1)
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with served(folder, overrides) as engine:
        (output,) = engine.generate([[5, 6, 7]], greedy)
    from transformers import AutoModelForCausalLM

    expected: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=1)
    whole = expected.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert output.outputs[0].token_ids == whole[0, 3:].tolist()


def test_step_times_are_not_taken_from_the_model_without_them(folder: str) -> None:
    keys = []
    for overrides in ({}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}):
        with served(folder, overrides) as engine:
            keys.append(profile_key(engine._running_rank().worker, []))
    assert "hf_overrides" not in keys[0]["model"]
    assert keys[1]["model"]["hf_overrides"]["rope_parameters"]["factor"] == 2.0


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_position_embedings": 1}, "for model type 'qwen3'; did you mean 'max_position_embeddings'?"),
        ({"id2label": {}}, "; known: attention_bias, attention_dropout, "),
        ({"rope_theta": 1e4}, "; did you mean 'model.hf_overrides.rope_parameters.rope_theta'?"),
        ({"rope_parameters": {"fator": 2.0}}, "rope_parameters.fator'; did you mean 'factor'?"),
        ({"vision_config": {}}, "unknown key 'model.hf_overrides.vision_config'"),
    ],
)
def test_unknown_keys_name_the_nearest(overrides: Any, message: str) -> None:
    found = complaint(qwen3(), overrides)
    assert found.startswith("unknown key 'model.hf_overrides.")
    assert message in found


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"])
def test_keys_that_determine_sharding_cannot_be_overridden(name: str) -> None:
    expected = f"model.hf_overrides.{name} cannot be changed: the checkpoint's weights can be read in one way only"
    assert complaint(qwen3(), {name: 8}) == expected


def test_model_specific_aliases_of_refused_keys_are_refused() -> None:
    assert "n_embd cannot be changed" in complaint(of("gpt2"), {"n_embd": 8})


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"dtype": "float16"}, "set model.dtype instead"),
        ({"rope_parameters": 3}, "give its keys"),
        ({"rope_parameters": {**YARN, "rope_type": "yran"}}, "choose from default, linear, dynamic, yarn"),
        ({"rope_parameters": {**YARN, "factor": 0.5}}, "factor field must be a float or int >= 1, got 0.5"),
        ({"rope_parameters": {"factor": 2.0}}, "Unrecognized keys in `rope_parameters` for 'rope_type'='default'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "Missing required keys"),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": 0}}, "division by zero"),
        ({"rope_parameters": {"rope_type": "linear", "factor": None}}, "must be a float or int >= 1, got None"),
        ({"max_position_embeddings": "many"}, "expected int, got str"),
        ({"num_hidden_layers": 33}, "the checkpoint has 32; give 1 to 32"),
        ({"layer_types": ["full_attention"]}, "`num_hidden_layers` (32) must be equal to the number of `layer_types`"),
    ],
)
def test_transformers_warnings_become_one_line_errors(overrides: Any, reason: str) -> None:
    assert reason in complaint(qwen3(), overrides)


def test_overrides_that_transformers_ignores_are_refused() -> None:
    factors = [1.0] * 48
    given = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    message = complaint(of("phi3"), {"rope_parameters": {**given, "original_max_position_embeddings": 2048}})
    assert message.endswith("set model.hf_overrides.original_max_position_embeddings")
    changed = overridden(of("phi3"), {"original_max_position_embeddings": 2048, "rope_parameters": given})
    assert changed.rope_parameters["original_max_position_embeddings"] == 2048


def test_layers_without_a_rotary_embedding_get_none() -> None:
    assert "full_attention layers of this model have no rotary embedding" in complaint(
        of("beam"), {"rope_parameters": YARN}
    )


def test_weights_that_do_not_fit_are_blamed_on_the_overrides(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tokenizer=False)
    changes = ModelConfig(path=str(tmp_path), hf_overrides={"mlp_bias": True})
    with pytest.raises(CheckpointError, match=r"lacks .*mlp.*\(model\.hf_overrides changes mlp_bias\)$"):
        ModelBuilder.from_folder(tmp_path, changes, Layout(Mode(1, 1)), 0, torch.device("cpu")).load()


# -- the longest text ----------------------------------------------------------------------------------------------


def test_all_rope_types_of_transformers_are_covered() -> None:
    assert set(KINDS) == set(ROPE_KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_longest_text_follows_the_rotary_embedding(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    values, longest = KINDS[kind]
    config = overridden(qwen3(), {"rope_parameters": {"rope_type": kind, **values}})
    assert max_supported_len(config) == longest
    assert choose_max_model_len(config, None) == (40960 if kind == "dynamic" else longest)
    assert choose_max_model_len(config, longest) == longest
    assert not caplog.messages
    assert choose_max_model_len(config, longest + 1) == longest + 1
    (message,) = caplog.messages
    assert message.startswith(f"model.max_model_len {longest + 1} is above the {longest} tokens")
    assert ("factor=5.0" in message) if kind == "yarn" else ("rope_type: yarn, factor: " in message)


def test_the_remedy_in_the_warning_works() -> None:
    config = qwen3()
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40960}
    assert max_supported_len(overridden(config, {"rope_parameters": given})) == 163840


def test_only_one_rank_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_max_model_len(qwen3(), 50000, warn=False) == 50000
    assert not caplog.messages


@pytest.mark.parametrize(("model_type", "positions"), [("gpt2", 1024), ("opt", 2048)])
def test_max_model_len_is_limited_by_learned_positions(model_type: str, positions: int) -> None:
    config = of(model_type)
    assert choose_max_model_len(config, None) == choose_max_model_len(config, positions) == positions
    with pytest.raises(ConfigError, match=rf"max_model_len {positions + 1} is above {positions}.*lower it$"):
        choose_max_model_len(config, positions + 1)


def test_the_engine_serves_the_length_that_yarn_gives(folder: str) -> None:
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    with served(folder, {"rope_parameters": given}) as engine:
        assert engine.max_model_len == 256
