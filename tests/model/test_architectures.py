"""Supported and refused architectures: the lists, the docs page, and the checks that need no list."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.equivalence.families import FAMILIES, tiny_config
from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.adapters import registry
from ulysses_infer.model.injection import architectures
from ulysses_infer.model.injection.architectures import REFUSED, VERIFIED, check_supported
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.parallel.layout import Layout, Mode

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def rows() -> dict[str, str]:
    """Model type to Yes, No or Untested, from the page."""
    return dict(re.findall(r"^\| (\S+) \| (Yes|No|Untested) \|", PAGE.read_text(), flags=re.MULTILINE))


def test_verified_models_are_those_of_the_sweep() -> None:
    assert {name for name, served in rows().items() if served == "Yes"} == VERIFIED


def test_refused_models_are_marked_no_in_the_docs() -> None:
    assert {name: rows().get(name) for name in REFUSED} == dict.fromkeys(REFUSED, "No")


def test_at_least_two_hundred_architectures_are_served() -> None:
    assert len(VERIFIED) >= 200


def test_the_readme_says_how_many() -> None:
    readme = PAGE.parents[1] / "README.md"
    assert f"**{len(VERIFIED)} of the {len(rows())} model types**" in readme.read_text()


def test_refused_models_fail_by_name_before_any_weight_is_read() -> None:
    from transformers import CONFIG_MAPPING

    def no_weights() -> Any:
        raise AssertionError("weights were asked for")

    settings = ModelConfig(path="-", allow_unverified=True)
    for model_type in set(REFUSED) - {"gemma4_assistant"}:  # whose default config does not pass its own checks
        with pytest.raises(UnsupportedModelError) as error:
            ModelBuilder(CONFIG_MAPPING[model_type](), no_weights, settings, Layout(Mode(1, 1)), 0, torch.device("cpu"))
        assert re.fullmatch(r"model type '[\w.-]+' is not supported: it\w* .+", str(error.value))


def test_families_of_the_equivalence_suite_are_verified() -> None:
    assert FAMILIES.keys() <= VERIFIED


@pytest.mark.parametrize("model_type", ["doge", "hrm_text", "whisper"])
def test_silently_wrong_models_are_refused_with_a_reason(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    with pytest.raises(UnsupportedModelError, match=f"{model_type}' is not supported: it"):
        check_supported(CONFIG_MAPPING[model_type](), allow_unverified=True)


def test_unverified_models_need_allow_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "VERIFIED", frozenset({"mistral"}))
    with pytest.raises(UnsupportedModelError, match=r"'llama' has not been verified.*allow_unverified=true"):
        check_supported(tiny_config("llama"), allow_unverified=False)
    check_supported(tiny_config("llama"), allow_unverified=True)


def load(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load a random model of `config` as one rank of one, its name on no list, without adapters."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(architectures, "REFUSED", {})
    monkeypatch.setattr(registry, "ADAPTERS", {})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    settings = ModelConfig(path="in memory", allow_unverified=True)
    ModelBuilder.from_pretrained(model, settings, Layout(Mode(1, 1)), 0, torch.device("cpu")).load()


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        (
            "gptj",
            {"n_embd": 64, "n_layer": 2, "n_head": 8, "rotary_dim": 8},
            "have attention, but attention ran on layers",
        ),
        ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 8}, "have attention, but attention ran on layers"),
        ("rwkv", {"hidden_size": 64, "num_hidden_layers": 2}, "no attention layer"),
        ("bart", {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 8}, "not causal"),
        ("diffllama", {"hidden_size": 64, "num_hidden_layers": 2}, "weight inside attention"),
        (
            "hrm_text",
            {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 8},
            "ran on layers .0, 1, 0, 1",
        ),
        ("doge", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}, "dt_proj .* weights inside"),
    ],
)
def test_silently_wrong_models_are_detected_without_the_list(
    model_type: str, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CONFIG_MAPPING

    with pytest.raises(UnsupportedModelError, match=reason):
        load(CONFIG_MAPPING[model_type](vocab_size=64, **changes), monkeypatch)


def test_verified_models_pass_the_same_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    load(tiny_config("llama"), monkeypatch)
