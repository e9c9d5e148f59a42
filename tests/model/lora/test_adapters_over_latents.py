"""Adapters of `kv_b_proj` disable the latent cache, and outputs stay correct."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import make_checkpoint, make_prompts, make_reference
from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.config import load_config
from ulysses_infer.errors import ConfigError


def test_an_adapter_of_kv_b_proj_has_its_effect(tmp_path: Path) -> None:
    model = make_checkpoint(tiny_config("deepseek_v3"), tmp_path / "model")
    prompts = make_prompts(lengths=(2, 7, 13))
    plain = make_reference(model, tmp_path, prompts)
    torch.manual_seed(0)
    chosen = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=4, target_modules=["kv_b_proj"])
    wrapped = peft.get_peft_model(model, chosen)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = make_reference(wrapped.merge_and_unload().eval(), tmp_path, prompts)
    assert expected.tokens != plain.tokens
    changes = {"lora.adapters": {"a": str(tmp_path / "adapter")}}
    with init_inference(str(tmp_path / "model"), **settings(**changes)) as engine:
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        outputs = engine.generate(prompts, params, adapter=["a"] * len(prompts))
    assert [output.outputs[0].token_ids for output in outputs] == expected.tokens


def test_latents_and_adapters_together_are_refused() -> None:
    given = {"model.path": "m", "lora.adapters": {"a": "folder"}, "cache.latent": True}
    with pytest.raises(ConfigError, match=r"cache\.latent = true: adapters may change kv_b_proj.*use null"):
        load_config(given)
