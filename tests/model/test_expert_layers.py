"""Expert placement: the choice, what each rank reads and stores, the token exchange, and the load counts."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.equivalence.cases import CROWD
from tests.equivalence.families import tiny_config, with_experts
from tests.equivalence.tiny_models import make_checkpoint, make_prompts
from tests.model.test_checkpoint import CountingSource
from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import CheckpointError, ConfigError
from ulysses_infer.model.experts import choose_placement
from ulysses_infer.model.experts.kinds import ExpertSizes
from ulysses_infer.model.experts.layer import Routed
from ulysses_infer.model.loading.files import SINGLE_NAME, SafetensorsSource
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.parallel.layout import Layout, Mode, even_span

CPU = torch.device("cpu")
GIB = 1 << 30
QWEN = ExpertSizes(54 * GIB, 4 * GIB, 128)
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "llama4_text", "ernie4_5_moe"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`checkpoint(family)`: a tiny one with 6 experts, and its weights merged as the model has them."""
    made: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}

    def get(family: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = make_checkpoint(tiny_config(family, **with_experts(family, 6)), folder)
            made[family] = folder, dict(model.named_parameters())
        return made[family]

    return get


def blueprint(folder: Path, base: Mode, shard: int, placement: str, **options: Any) -> ModelBuilder:
    settings = ModelConfig(path=str(folder))
    return ModelBuilder.from_folder(folder, settings, Layout(base), shard, CPU, expert_placement=placement, **options)


def experts_of(model: Any) -> dict[str, torch.Tensor]:
    parameters = model.named_parameters()
    return {name: parameter for name, parameter in parameters if ".experts." in name}


# -- the choice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "base", "available", "chosen"),
    [
        (QWEN, Mode(8, 1), 130 * GIB, "replicate"),
        (QWEN, Mode(8, 1), 100 * GIB, "expert"),
        (QWEN, Mode(4, 2), 100 * GIB, "replicate"),
        (QWEN._replace(num_experts=60), Mode(8, 1), 100 * GIB, "width"),
        (QWEN, Mode(1, 1), 60 * GIB, "replicate"),
        (QWEN, Mode(8, 1), None, "replicate"),
        (ExpertSizes(0, 100 * GIB, 0), Mode(8, 1), 100 * GIB, "replicate"),
    ],
)
def test_auto_replicates_experts_while_weights_leave_half_of_the_memory(
    sizes: ExpertSizes, base: Mode, available: int | None, chosen: str
) -> None:
    assert choose_placement("auto", Layout(base), sizes, available) == chosen


def test_an_explicit_placement_is_kept() -> None:
    assert choose_placement("width", Layout(Mode(8, 1)), QWEN, 1000 * GIB) == "width"


def test_the_automatic_choice_is_logged_with_its_numbers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ulysses_infer"):
        choose_placement("auto", Layout(Mode(8, 1)), QWEN, 100 * GIB)
    assert "expert (of 100.0 GiB a rank, weights take 58.0 GiB replicated, else 10.8 GiB)" in caplog.text


def test_an_indivisible_width_is_refused_with_the_remedy(tmp_path: Path) -> None:
    tiny_config("qwen3_moe", moe_intermediate_size=36).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        blueprint(tmp_path, Mode(8, 1), 0, "width")
    assert "experts of width 36 over sp * tp = 8 ranks" in str(caught.value)
    assert str(caught.value).endswith("sp * tp = one of 1, 2, 3, 4, 6, 9, 12")


# -- what is stored ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 4, 8])  # 6 experts: even, uneven, and fewer than ranks
@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_is_complete_on_one_rank(family: str, world_size: int, checkpoint: Any) -> None:
    folder, whole = checkpoint(family)
    ranks = [blueprint(folder, Mode(world_size, 1), g, "expert").load() for g in range(world_size)]
    for name in experts_of(ranks[0].module):
        parts = [dict(rank.module.named_parameters())[name] for rank in ranks]
        assert [len(part) for part in parts] == [even_span(6, g, world_size).size for g in range(world_size)]
        assert torch.equal(torch.cat(parts), whole[name])


@pytest.mark.parametrize("base", [Mode(4, 1), Mode(2, 2), Mode(1, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_has_an_equal_width_of_every_expert_for_any_base(family: str, base: Mode, checkpoint: Any) -> None:
    folder, whole = checkpoint(family)
    ranks = [blueprint(folder, base, g, "width").load() for g in range(4)]
    for name in experts_of(ranks[0].module):
        parts = [dict(rank.module.named_parameters())[name] for rank in ranks]
        cut = parts[0].shape != whole[name].shape  # every rank has the bias of the down projection
        assert sum(part.numel() for part in parts) == whole[name].numel() * (1 if cut else 4)
        assert torch.equal(torch.cat([part.flatten() for part in parts]).unique(), whole[name].unique())


@pytest.mark.parametrize("placement", ["expert", "width"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "llama4_text"])
def test_only_kept_bytes_of_experts_are_read(family: str, placement: str, checkpoint: Any) -> None:
    folder, _ = checkpoint(family)
    for shard in range(4):
        plan = blueprint(folder, Mode(4, 1), shard, placement)
        source = CountingSource(SafetensorsSource(folder))
        plan.open_source = lambda source=source: source
        expected = plan.weight_bytes
        model = plan.load()
        assert source.bytes == model.weight_bytes == expected


def test_expert_bytes_of_a_rank_match_its_budget(checkpoint: Any) -> None:
    folder, whole = checkpoint("qwen3_moe")
    all_experts = sum(p.numel() * 4 for name, p in whole.items() if ".experts." in name)
    shares = {
        (base, placement): blueprint(folder, base, 0, placement).expert_bytes / all_experts
        for base in (Mode(2, 1), Mode(1, 2))
        for placement in ("replicate", "expert", "width")
    }
    assert shares[Mode(2, 1), "replicate"] == 1
    assert {share for key, share in shares.items() if key != (Mode(2, 1), "replicate")} == {0.5}


def test_auto_placement_depends_on_available_memory(checkpoint: Any) -> None:
    folder, _ = checkpoint("qwen3_moe")
    placements = [blueprint(folder, Mode(2, 1), 0, "auto", memory=m).injection.expert_placement for m in (GIB, 1000)]
    assert placements == ["replicate", "expert"]


def test_a_missing_expert_is_noticed_before_others_take_its_place(checkpoint: Any, tmp_path: Path) -> None:
    folder, _ = checkpoint("qwen3_moe")
    shutil.copy(folder / "config.json", tmp_path)
    tensors = load_file(folder / SINGLE_NAME)
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(tensors, tmp_path / SINGLE_NAME, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has 5 tensors like model.layers.0.mlp.experts.0.up_proj.weight"):
        blueprint(tmp_path, Mode(2, 1), 0, "expert").load()


# -- token exchange and load counts ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_payloads_are_exchanged_bit_for_bit(dtype: torch.dtype) -> None:
    routed = Routed(
        torch.randn(5, 8, dtype=dtype), torch.tensor([[0, 70_000]]).expand(5, 2), torch.rand(5, 2, dtype=dtype)
    )
    arrived = routed.unpack(routed.pack()[2:])
    assert torch.equal(arrived.hidden, routed.hidden[2:])
    assert torch.equal(arrived.experts, routed.experts[2:])
    assert torch.equal(arrived.torch_weights, routed.torch_weights[2:])
    assert arrived.torch_weights.dtype == dtype


def count_tokens(folder: Path, placement: str) -> Any:
    from ulysses_infer import SamplingParams, init_inference

    profile = replace(CROWD, prefix_caching=False, settings={"parallel.expert_placement": placement})
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with init_inference(str(folder), **profile.overrides((2, 1))) as engine:
        before = engine.stats()
        found = {}
        for mode in ("sp", "tp"):
            engine.set_policy("static", mode=mode)
            engine.generate(make_prompts(), params)
            after = engine.stats()
            tokens = after["modes"][str(Mode(2, 1) if mode == "sp" else Mode(1, 2))]["tokens"]
            ranks = zip(after["expert_tokens_per_rank"], before["expert_tokens_per_rank"], strict=True)
            found[mode] = tokens, [now - then for now, then in ranks]
            before = after
    return found, after["expert_placement"], after["expert_tokens"]


@pytest.mark.distributed
@pytest.mark.parametrize("placement", ["replicate", "expert", "width"])
def test_the_load_of_every_rank_is_counted(placement: str, checkpoint: Any, rank_pool: Any) -> None:
    folder, _ = checkpoint("qwen3_moe")
    results = rank_pool(2).run(count_tokens, folder, placement)
    assert results[0] == results[1], "the same on all ranks"
    found, placed, of_experts = results[0]
    assert placed == placement
    choices = 2 * 2  # layers, experts per token
    for mode, (tokens, per_rank) in found.items():
        slices = 1 if placement == "expert" or (placement, mode) == ("replicate", "sp") else 2
        assert sum(per_rank) == tokens * choices * slices
    assert [len(layer) for layer in of_experts] == [6, 6]
    assert all(sum(layer) == sum(of_experts[0]) for layer in of_experts)
