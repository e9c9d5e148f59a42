"""What a checkpoint's generation config means for requests."""

import json
import logging
from types import SimpleNamespace

import pytest

from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import CheckpointError, ConfigError
from ulysses_infer.model.loading.generation_config import eos_token_ids, load_generation_config, sampling_defaults

RECOMMENDED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "max_new_tokens": 99, "min_p": None}


def settings(**changes):
    return ModelConfig(path="-", **changes)


def test_recommended_sampling_is_the_default_of_requests():
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "max_tokens": 99}
    assert sampling_defaults(settings(), RECOMMENDED) == expected


def test_it_can_be_ignored_replaced_and_overridden(tmp_path):
    assert sampling_defaults(settings(generation_config="none"), RECOMMENDED) == {}
    (tmp_path / "generation_config.json").write_text('{"top_k": 3}')
    assert sampling_defaults(settings(generation_config=str(tmp_path)), RECOMMENDED) == {"top_k": 3}
    without = settings(override_generation_config={"temperature": None})
    assert sampling_defaults(without, {"temperature": 0.6, "top_k": 3}) == {"top_k": 3}
    changed = settings(generation_config="none", override_generation_config={"temperature": 0})
    assert sampling_defaults(changed, RECOMMENDED) == {"temperature": 0.0}


def test_a_value_that_no_request_may_have_is_left_out_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert sampling_defaults(settings(), {"temperature": -1, "top_p": "x", "top_k": 5, "max_new_tokens": 0}) == {
            "top_k": 5
        }
    assert "temperature is out of range, got -1" in caplog.text
    assert "top_p must be a number, got 'x'" in caplog.text
    assert "max_new_tokens must be from 1" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"override_generation_config": {"temprature": 1}}, "unknown key 'temprature'"),
        ({"override_generation_config": {"temperature": 9}}, "temperature is out of range, got 9"),
        ({"generation_config": "nowhere"}, "has no generation_config.json"),
    ],
)
def test_a_wrong_setting_is_one_line(changes, message):
    with pytest.raises(ConfigError, match=message):
        sampling_defaults(settings(**changes), {})


def test_end_tokens_of_all_three_sources_end_the_text(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1, "text_config": {"eos_token_id": [2]}}))
    tokenizer, config = SimpleNamespace(eos_token_id=3), SimpleNamespace(eos_token_id=9)
    assert eos_token_ids({"eos_token_id": [4, 5]}, tmp_path, config, tokenizer) == {1, 2, 3, 4, 5}
    assert eos_token_ids({}, None, config, None) == {9}  # the default of the model's class


def test_values_that_are_not_token_ids_are_ignored():
    assert eos_token_ids({"eos_token_id": [[1], "2", None, True, 7]}, None, None, None) == {7}


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        load_generation_config(tmp_path)
