"""With all Triton kernels, in Triton's interpreter: transformers' tokens and log-probabilities in every mode."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.equivalence.cases import CROWD, Profile, check, run_case
from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import make_checkpoint, make_prompts, make_reference
from tests.kernels.interpreter import use_exact_rounding
from tests.model.quantization.checkpoints import FORMATS, make_quantised
from ulysses_infer.config import ModelConfig
from ulysses_infer.kernels.launch import assume, counted
from ulysses_infer.model.context import StepContext
from ulysses_infer.model.injection.probe import ProbeAttention, ProbeCache, trial_context
from ulysses_infer.model.model import ModelBuilder, ShiftModel
from ulysses_infer.parallel.layout import Layout, Mode

RUNTIME = {"threads_per_rank": 1, "device": "cpu", "debug": True, "enforce_eager": True}
KERNELS = replace(CROWD, name="kernels", settings={"runtime": RUNTIME})
LENGTHS = (6, 5)
"""Lengths of the prompts. The interpreter is slow."""
NEW_TOKENS = 2


def run_with_kernels(folder: Path, base: tuple[int, int], profile: Profile, prompts: list[list[int]]) -> Any:
    """On a rank: `run_case` as on a GPU, with stacked weights and placed heads."""
    with assume("cpu", (9, 0)):
        return run_case(folder, base, profile, prompts, NEW_TOKENS)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "base"),
    [
        pytest.param("qwen3", (2, 1), marks=pytest.mark.thorough),
        pytest.param("qwen3_moe", (2, 1), marks=pytest.mark.thorough),  # by default: test_fused_mixtures
        pytest.param("llama", (2, 2), marks=pytest.mark.thorough),
        pytest.param("qwen2", (4, 1), marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_kernels_equal_transformers(family: str, base: tuple[int, int], rank_pool: Any, tmp_path: Path) -> None:
    check_kernels(family, base, rank_pool, tmp_path)


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "base", "heads"),
    [("llama", (2, 1), (9, 3)), ("qwen2", (2, 2), (6, 2)), ("qwen3", (4, 1), (6, 3)), ("llama", (4, 1), (3, 3))],
    ids=str,
)
def test_kernels_equal_transformers_with_padded_heads(
    family: str, base: tuple[int, int], heads: tuple[int, int], rank_pool: Any, tmp_path: Path
) -> None:
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 8 * heads[0]}
    check_kernels(family, base, rank_pool, tmp_path, **sizes)


def check_kernels(family: str, base: tuple[int, int], rank_pool: Any, folder: Path, **sizes: int) -> None:
    """A tiny model of `family` on every rank of `base`, against transformers."""
    model = make_checkpoint(tiny_config(family, **sizes), folder)
    expected = make_reference(model, folder, make_prompts(lengths=LENGTHS), NEW_TOKENS)
    outcomes = rank_pool(base[0] * base[1]).run(run_with_kernels, folder, base, KERNELS, expected.prompts)
    check(outcomes, expected, KERNELS, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))


WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
"""Sizes that FP8 tensor cores read."""


@pytest.mark.parametrize("name", ["compressed-channel", pytest.param("modelopt", marks=pytest.mark.thorough)])
def test_inputs_are_quantised_once_by_the_kernels_that_write_them(name: str, tmp_path: Path) -> None:
    use_exact_rounding()
    make_quantised(tiny_config("qwen3", **WIDE), tmp_path, FORMATS[name])
    with assume("cpu", (9, 0)):
        layout, settings = Layout(Mode(1, 1)), ModelConfig(path="-", dtype="bfloat16")
        model = ModelBuilder.from_folder(tmp_path, settings, layout, 0, torch.device("cpu")).load()
        context = trial_context(layout, 0, ProbeCache.of(model), ProbeAttention())
        found, launches = logits_and_launches(model, context)
        for module in model.module.modules():
            if hasattr(module, "_elementwise"):
                module._elementwise._has_fp8 = False  # every product quantises its input itself
        expected, separate = logits_and_launches(model, context)
    assert torch.equal(found, expected)
    assert launches["quantise_rows"] < separate["quantise_rows"]
    # The first norm's output as often as products read it, and the attention output of both layers.
    stacked = name == "compressed-channel"
    assert launches["quantise_rows"] == (1 if stacked else 3) + 2


def logits_and_launches(model: ShiftModel, context: StepContext) -> tuple[torch.Tensor, Counter[str]]:
    """The logits of two tokens, and the launches of their step by kernel."""
    launches: Counter[str] = Counter()
    with counted(launches):
        logits = model.forward(torch.tensor([3, 5]), torch.tensor([1, 2]), torch.arange(2), context)
    return logits, launches
