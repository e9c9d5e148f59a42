"""An FP8 cache gives what attention over keys and values rounded to FP8 gives, in every mode, scaled or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.equivalence import cases
from tests.equivalence.cases import CROWD, INNER, WHOLE, check, run_case
from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import NEW_TOKENS, make_checkpoint, make_prompts, make_reference
from tests.equivalence.unequal import make_unequal
from ulysses_infer.cache.paged import FP8, CacheScales, CacheShape, PagedCache
from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import CheckpointError
from ulysses_infer.model.loading.files import MemorySource
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.model.quantization.cache_scales import apply_cache_scales
from ulysses_infer.parallel.layout import Layout, Mode

CPU = torch.device("cpu")
NAME = "rounded_to_fp8"
TOLERANCE = 2e-3  # the last bit decides the rounding of numbers midway between two of FP8
SCALES = {0: (0.003, 0.005), 1: (0.2, 1.0)}  # of keys and values, by layer; the first ones make some numbers too large


def rounded(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """The values read from an FP8 cache."""
    return (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(tensor.dtype) * scale


def attend_rounded(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scales = module.cache_scales
    return sdpa_attention_forward(module, query, rounded(key, scales[0]), rounded(value, scales[1]), mask, **options)


def make_rounding(model: Any, scales: dict[int, tuple[float, float]]) -> Any:
    """transformers' model with keys and values rounded on their way into attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend_rounded)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    for layer in model.model.layers:
        layer.self_attn.cache_scales = scales.get(layer.self_attn.layer_idx, (1.0, 1.0))
    return model


def add_scales(folder: Any, names: tuple[str, str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for layer, values in SCALES.items():
        for name, value in zip(names, values, strict=True):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([value])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "names", "base", "profile"),
    [
        ("llama", None, (4, 1), CROWD),
        ("llama", ("k_scale", "v_scale"), (2, 2), INNER),
        ("qwen3", ("k_proj.output_scale", "v_proj.output_scale"), (2, 1), WHOLE),
    ],
    ids=["unscaled", "scaled", "old names"],
)
def test_every_mode_reads_rounded_values(
    family: str, names: Any, base: Any, profile: Any, rank_pool: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint(tiny_config(family), tmp_path)
    if names is not None:
        add_scales(tmp_path, names)
    prompts = make_prompts()
    plain = make_reference(model, tmp_path, prompts)
    expected = make_reference(make_rounding(model, {} if names is None else SCALES), tmp_path, prompts)
    assert max(abs(a - b) for a, b in zip(plain.logprobs[3], expected.logprobs[3], strict=False)) > 5 * TOLERANCE
    monkeypatch.setattr(cases, "TOLERANCE", TOLERANCE)
    fp8 = replace(profile, settings={"cache.dtype": "fp8"})
    outcomes = rank_pool(base[0] * base[1]).run(run_case, tmp_path, base, fp8, prompts, NEW_TOKENS)
    check(outcomes, expected, fp8, num_modes=3 if base == (4, 1) else 2)


def test_scales_are_read_and_bad_ones_refused(tmp_path):
    make_checkpoint(tiny_config("llama"), tmp_path)
    add_scales(tmp_path, ("k_scale", "v_scale"))

    def plans():
        blueprint = ModelBuilder.from_folder(tmp_path, ModelConfig(path=str(tmp_path)), Layout(Mode(1, 1)), 0, CPU)
        blueprint.load_cache_scales()
        return [layer.head_plan.cache_scales for layer in blueprint.injection.attention_layers]

    for found, expected in zip(plans(), SCALES.values(), strict=True):
        assert found == pytest.approx(CacheScales(*expected))
    tensors = load_file(tmp_path / "model.safetensors")
    for bad, words in ((torch.ones(4), "one scale a layer"), (torch.zeros(1), "cannot scale a cache")):
        tensors["model.layers.1.self_attn.v_scale"] = bad
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            plans()


def test_it_takes_one_byte_per_number_and_never_holds_nan():
    shape = CacheShape.uniform(1, 2, 8, 6, 4, FP8)
    assert shape.bytes_per_block == 4 * 2 * 14
    cache = PagedCache(shape, 3, CPU)
    key, value = torch.randn(3, 2, 8), torch.tensor([1e6, -1e6, 448, 0.3, -2.5, 0]).expand(3, 2, 6)
    cache.write(0, torch.tensor([7, 0, 11]), key, value)
    keys, values = cache.read(0, torch.tensor([7, 0, 11]))
    assert torch.equal(keys.float(), key.to(FP8).float())
    assert values[0, 0].float().tolist() == pytest.approx([448, -448, 448, 0.3125, -2.5, 0])


def test_a_layer_that_reads_anothers_cache_has_its_scales(tmp_path):
    make_unequal("gemma4-small", tmp_path)
    layout, settings = Layout(Mode(1, 1)), ModelConfig(path="-")
    injection = ModelBuilder.from_folder(tmp_path, settings, layout, 0, CPU).injection
    scales = {f"model.layers.{n}.self_attn.{kind}_scale": torch.tensor(0.5 * n + 1) for n in (2, 3) for kind in "kv"}
    apply_cache_scales(injection, MemorySource(scales))
    plans = [layer.head_plan for layer in injection.attention_layers]
    assert [plan.source for plan in plans] == [None, None, None, None, 2, 3]
    assert [plan.cache_scales for plan in plans[2:]] == [CacheScales(2.0, 2.0), CacheScales(2.5, 2.5)] * 2
