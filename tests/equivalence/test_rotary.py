"""Every rotary kind that transformers knows; those that it recomputes for each batch are fixed for the longest text.

`dynamic` and `longrope` have other frequencies for long texts than for short ones. transformers uses those of the
longest text in a batch for the whole batch, while keys already cached keep theirs. The engine has one set: that of its
own longest text. So it must equal transformers with these frequencies fixed on every text, and unchanged transformers
on the longest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.equivalence.cases import CROWD, TOLERANCE, Profile, check, run_case
from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import (
    NEW_TOKENS,
    make_checkpoint,
    make_prompts,
    make_reference,
    token_logprobs,
)
from ulysses_infer.model.layers.rotary import freeze_rotary

pytestmark = pytest.mark.distributed
LONGEST = 96  # the engine's max_model_len, past the checkpoint's original 64
HALF = 4  # rotary frequencies of a head of 8

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "factor": 2.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6][:HALF],
    "long_factor": [1.0, 2.0, 3.0, 4.0][:HALF],
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
    "longrope": ("phi3", LONGROPE),
    "linear": ("llama", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": (
        "llama",
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64},
    ),
    "proportional": ("llama", {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "layers": (
        "gemma3_text",
        {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 50000.0,
                "factor": 2.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "moving layers": (
        "gemma3_text",
        {
            "sliding_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
            "full_attention": {"rope_type": "dynamic", "rope_theta": 50000.0, "factor": 2.0},
        },
    ),
}

MOVING = ("dynamic", "longrope", "moving layers")


def rotary_config(kind: str) -> Any:
    """A tiny config with that kind of rotary embedding; `dynamic` ones stretch past 64 positions."""
    family, parameters = KINDS[kind]
    positions = 64 if "dynamic" in str(KINDS[kind]) else 128
    return tiny_config(family, rope_parameters=parameters, max_position_embeddings=positions)


@pytest.fixture(params=list(KINDS))
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    return make_checkpoint(rotary_config(request.param), tmp_path), tmp_path


def with_length(profile: Profile, length: int) -> Profile:
    return replace(profile, settings={"model.max_model_len": length})


def test_batch_equals_transformers_with_fixed_frequencies(checkpoint: tuple[Any, Path], rank_pool: Any) -> None:
    model, folder = checkpoint
    freeze_rotary(model, LONGEST)
    expected = make_reference(model, folder, make_prompts(lengths=(1, 9, 40, 75)))
    profile = with_length(CROWD, LONGEST)
    check(rank_pool(2).run(run_case, folder, (2, 1), profile, expected.prompts, NEW_TOKENS), expected, profile, 2)


@pytest.mark.parametrize("checkpoint", MOVING, indirect=True)
def test_longest_sequence_equals_unchanged_transformers(checkpoint: tuple[Any, Path], rank_pool: Any) -> None:
    model, folder = checkpoint
    (prompt,) = make_prompts(lengths=(LONGEST - 1,))
    profile = with_length(CROWD, LONGEST)
    outcomes = rank_pool(2).run(run_case, folder, (2, 1), profile, [prompt], 1)
    # One token longer than was scored: at the engine's longest sequence both see the same length.
    whole = torch.tensor([[*prompt, *outcomes[0].tokens[0]]])
    assert whole.shape[1] == LONGEST
    assert outcomes[0].logprobs[0] == pytest.approx(token_logprobs(model, whole), abs=TOLERANCE)


def test_every_kind_that_transformers_knows_is_here() -> None:
    every = [values for _, given in KINDS.values() for values in (given, *given.values()) if isinstance(values, dict)]
    assert {values["rope_type"] for values in every if "rope_type" in values} == {"default", *ROPE_INIT_FUNCTIONS}


class DynamicFrequencies(torch.nn.Module):
    """Recomputes its frequencies where its input is, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.rope_type = "dynamic"
        self.register_buffer("inv_freq", torch.zeros(4, device="cuda"))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        assert position_ids.device == x.device
        self.register_buffer("inv_freq", torch.ones(4, device=x.device))
        return self.inv_freq


def test_frozen_frequencies_stay_on_the_device() -> None:
    with FakeTensorMode():
        module = DynamicFrequencies()
        freeze_rotary(module, LONGEST)
        assert module.inv_freq.device.type == "cuda"
    assert module.rope_type == "frozen"
