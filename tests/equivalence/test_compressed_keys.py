"""Keys compressed from several tokens (DeepSeek-V4): transformers' tokens and log-probabilities in every mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, check, check_case, layouts, run_case
from tests.equivalence.families import SHAPE
from tests.equivalence.tiny_models import NEW_TOKENS, Reference, make_checkpoint, make_prompts, make_reference
from tests.model.quantization.checkpoints import FORMATS, change_config
from ulysses_infer.errors import CheckpointError, ConfigError
from ulysses_infer.model.injection.inject import Injection
from ulysses_infer.model.lora.adapter import Adapter, LoraWeights
from ulysses_infer.model.lora.attach import check_adapter
from ulysses_infer.model.model import build_empty_model
from ulysses_infer.parallel.layout import Layout, Mode

pytestmark = pytest.mark.distributed

LENGTHS = (1, 2, 7, 13, 21, 38, 45)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
V4 = {
    **SHAPE,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 24,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    "swiglu_limit": 1.0,
    "sliding_window": 6,
    "o_groups": 4,
    "o_lora_rank": 12,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 4,
    "rope_parameters": YARN,
}
RATES = {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8}
MODELS: dict[str, dict[str, Any]] = {
    "short and long": {"compress_rates": RATES},  # several entries per block, and one in every second block
    "equal": {"compress_rates": dict.fromkeys(RATES, 4), "o_groups": 2},  # groups that ranks share
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny checkpoint of one of `MODELS` with transformers' answers."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            folder = tmp_path_factory.mktemp("v4")
            made[name] = make_reference(make_compressed(name, folder), folder, make_prompts(lengths=LENGTHS))
        return made[name]

    return get


def compressed_config(name: str, **changes: Any) -> Any:
    from transformers import DeepseekV4Config

    return DeepseekV4Config(**{**V4, **MODELS[name], **changes})


def make_compressed(name: str, folder: Path, **changes: Any) -> Any:
    """As `make_checkpoint`, with random experts for each token id."""
    model = make_checkpoint(compressed_config(name, **changes), folder)
    generator = torch.Generator().manual_seed(0)
    for key, buffer in model.named_buffers():
        if key.endswith("tid2eid"):
            experts = torch.rand(buffer.shape[0], model.config.n_routed_experts, generator=generator).argsort(dim=1)
            buffer.copy_(experts[:, : buffer.shape[1]])
    model.save_pretrained(folder)
    return model


STORED_NAMES = {
    "self_attn.": "attn.",
    "compressor.": "",
    "q_a_proj": "wq_a",
    "q_b_proj": "wq_b",
    "kv_proj": "wkv",
    "o_a_proj": "wo_a",
    "o_b_proj": "wo_b",
}


def quantise_attention(model: Any, folder: Path) -> None:
    """Store attention in FP8, as DeepSeek does: all but the compressors and the index keys and weights."""
    chosen, tensors = FORMATS["fp8-block"], load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        is_dense = "compressor" in name and not name.endswith("indexer.q_b_proj")
        if "self_attn" not in name or is_dense or not isinstance(module, torch.nn.Linear):
            continue
        key = name
        for ours, theirs in STORED_NAMES.items():
            key = key.replace(ours, theirs)
        stored, dense = chosen.quantise(module.weight.detach())
        del tensors[f"{key}.weight"]
        tensors |= {f"{key}.{leaf}": tensor.contiguous() for leaf, tensor in stored.items()}
        with torch.no_grad():
            module.weight.copy_(dense)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    spared = ["lm_head", *(f"model.layers.{layer}.mlp" for layer in range(model.config.num_hidden_layers))]
    change_config(folder, quantization_config={**chosen.config, "modules_to_not_convert": spared})


@pytest.mark.thorough
def test_attention_stored_in_fp8_with_its_grouped_projection(rank_pool: Any, tmp_path: Path) -> None:
    model = make_compressed("equal", tmp_path)
    quantise_attention(model, tmp_path)
    expected = make_reference(model, tmp_path, make_prompts(lengths=LENGTHS))
    outcomes = rank_pool(4).run(run_case, tmp_path, (2, 2), CROWD, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, CROWD, num_modes=2)


def cases() -> list[Any]:
    """Both models on most bases with alternating profiles; one case by default."""
    chosen = []
    for turn, name in enumerate(MODELS):
        for number, base in enumerate(layouts(turn)):
            profile = (CROWD, TIGHT, INNER if base == (2, 2) else CROWD, WHOLE, TIGHT)[(turn + number) % 5]
            marks = [] if (name, base) == ("short and long", (2, 1)) else [pytest.mark.thorough]
            chosen.append(
                pytest.param(name, base, profile, id=f"{name}-sp{base[0]}xtp{base[1]}-{profile.name}", marks=marks)
            )
    return chosen


@pytest.mark.parametrize(("name", "base", "profile"), cases())
def test_compressed_keys_give_what_transformers_gives(
    name: str, base: tuple[int, int], profile: Profile, rank_pool: Any, reference: Any
) -> None:
    expected = reference(name)
    check_case(rank_pool, expected, base, profile)


COUNTS = ("num_attention_heads", "o_groups", "index_n_heads", "n_routed_experts", "num_experts_per_tok", "hc_mult")


@pytest.mark.thorough
@pytest.mark.parametrize("base", [(8, 1), (2, 4)])
def test_deepseek_v4_flash_with_its_heads_groups_and_experts_on_eight_ranks(
    base: tuple[int, int], rank_pool: Any, tmp_path: Path
) -> None:
    """The counts are those of transformers' defaults; widths and layers are small enough for a test."""
    from transformers import DeepseekV4Config

    real = DeepseekV4Config()
    assert (real.num_attention_heads, real.o_groups, real.n_routed_experts) == (64, 8, 256)
    model = make_compressed("short and long", tmp_path, **{name: getattr(real, name) for name in COUNTS}, head_dim=8)
    expected = make_reference(model, tmp_path, make_prompts(lengths=(1, 9, 31)), 4)
    profile = replace(CROWD, settings={"parallel.expert_placement": "expert"})
    outcomes = rank_pool(8).run(run_case, tmp_path, base, profile, expected.prompts, 4)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))


def test_adapters_of_the_grouped_projection_are_refused() -> None:
    injection = Injection(build_empty_model(compressed_config("short and long"), torch.float32), Layout(Mode(1, 1)), 0)
    name = "model.layers.0.self_attn.o_a_proj"
    nothing = LoraWeights(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
    with pytest.raises(CheckpointError, match="o_a_proj, whose inputs are grouped"):
        check_adapter(injection, Adapter("mine", {name: nothing}))


@pytest.mark.parametrize(("base", "fitting"), [((3, 1), "1, 2, 4, 8"), ((16, 1), "1, 2, 4, 8")])
def test_groups_of_heads_that_cannot_be_cut_name_the_layouts_that_can(base: tuple[int, int], fitting: str) -> None:
    model = build_empty_model(compressed_config("short and long"), torch.float32)
    with pytest.raises(ConfigError) as failure:
        Injection(model, Layout(Mode(*base)), shard=0)
    assert str(failure.value) == (
        "8 heads in 4 groups, which the output projection takes together, do not divide over sp * tp = "
        f"{base[0] * base[1]} ranks; use sp * tp = {fitting}"
    )
