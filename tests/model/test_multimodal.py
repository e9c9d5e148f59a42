"""Multimodal checkpoints served as language models: which weights are kept, and how their configs are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import make_checkpoint, token_logprobs
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import CheckpointError, UnsupportedModelError
from ulysses_infer.model.injection.architectures import check_supported
from ulysses_infer.model.loading.files import SafetensorsSource
from ulysses_infer.model.model import ModelBuilder, read_config
from ulysses_infer.parallel.layout import Layout, Mode

ENGINE: dict[str, Any] = {
    "model": {"max_model_len": 64},
    "cache": {"num_blocks": 16, "block_size": 4},
    "runtime": {"threads_per_rank": 1, "device": "cpu"},
}


class Watched(SafetensorsSource):
    """Records what is read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen: list[str] = []

    def read(self, key: str, kept: Any) -> torch.Tensor:
        self.seen.append(key)
        return super().read(key, kept)


def load(folder: Path, source: Any = None) -> Any:
    settings = ModelConfig(path=str(folder))
    opened = None if source is None else (lambda: source)
    plan = ModelBuilder.from_folder(folder, settings, Layout(Mode(1, 1)), 0, torch.device("cpu"), open_source=opened)
    return plan.load(fuse=False)


def test_multimodal_encoders_are_neither_read_nor_kept(tmp_path: Path) -> None:
    whole = make_checkpoint(next(tiny_configs("mistral3")), tmp_path)
    source = Watched(tmp_path)
    model = load(tmp_path, source)
    encoders = [name for name in source.keys() if "vision" in name or "projector" in name]  # noqa: SIM118
    assert encoders
    assert not set(encoders) & set(source.seen)
    text = sum(p.numel() for name, p in whole.named_parameters() if "language_model" in name or "lm_head" in name)
    assert model.weight_bytes == 4 * text


@pytest.mark.parametrize("family", ["llama", "mistral3"])
def test_an_untied_head_in_the_checkpoint_overrides_the_config(family: str, tmp_path: Path) -> None:
    """Configs of published multimodal checkpoints may not mention weight tying, which transformers then assumes."""
    config = tiny_config("llama") if family == "llama" else next(tiny_configs(family))
    config.tie_word_embeddings = False
    model = make_checkpoint(config, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    prompt = [5, 17, 3, 42, 8]
    with init_inference(str(tmp_path), **ENGINE) as engine:
        (answer,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    found = [entry[token].logprob for token, entry in zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)]
    assert found == pytest.approx(token_logprobs(model, torch.tensor([prompt])), abs=1e-4)


def test_scouts_released_config_is_read(tmp_path: Path) -> None:
    text = {"model_type": "llama4_text", "num_hidden_layers": 2, "attn_temperature_tuning": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": text}))
    config = read_config(tmp_path)
    assert (config.model_type, config.text_config.attn_temperature_tuning) == ("llama4", True)
    assert config.text_config.num_hidden_layers == 2


def test_an_invalid_config_value_is_named_in_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "mlp_bias": 3}))
    with pytest.raises(CheckpointError, match=r"^[^\n]*'mlp_bias'[^\n]*$"):
        read_config(tmp_path)


def test_a_wrapper_is_supported_only_if_its_language_model_is() -> None:
    check_supported(CONFIG_MAPPING["llava"](text_config={"model_type": "qwen2"}), allow_unverified=False)
    with pytest.raises(UnsupportedModelError, match="model type 'doge' is not supported: its attention masks"):
        check_supported(CONFIG_MAPPING["llava"](text_config={"model_type": "doge"}), allow_unverified=True)


def test_bidirectional_prompts_are_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match="'paligemma' is not supported: its prompts use bidirectional attention"
    ):
        check_supported(CONFIG_MAPPING["paligemma"](), allow_unverified=True)
