"""`--dry-run`: every recipe of this repository for GPUs, from the config.json of its model, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.recipe_models import MODELS, recipe_path, write_config
from tests.tiny import tiny_llama
from ulysses_infer.cli.arguments import parse
from ulysses_infer.cli.dry_run.command import run as run_command
from ulysses_infer.cli.dry_run.config_only import read_config_only
from ulysses_infer.cli.dry_run.gpus import TABLE, find_gpu, own_gpu
from ulysses_infer.cli.dry_run.report import DryRun, dry_run
from ulysses_infer.cli.dry_run.table import render, sections
from ulysses_infer.cli.rank import run as run_rank
from ulysses_infer.config import ModelConfig, load_config
from ulysses_infer.errors import CheckpointError, ConfigError
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.worker.drafting.draft_model import DraftModel
from ulysses_infer.worker.graphs.cuda_graphs import CudaGraphRunner
from ulysses_infer.worker.graphs.launch_counter import StepLaunches

GIB = 1 << 30
LESS = "scheduler.max_num_seqs=16"  # fewer steps to capture
WEIGHTS = {
    "llama-3.3-70b-fp8-8xh200": 66.0,
    "llama-3.3-70b-fp8-8xh100": 34.1,
    "qwen3-32b-fp8-8xh200": 30.7,
    "qwen3-32b-yarn-128k-8xh200": 30.7,
    "llama-4-scout-17b-16e-8xh200": 33.1,
    "qwen3-30b-a3b-8xh200": 56.4,
    "qwen3-14b-2x24gb": 14.5,
    "qwen3-8b-2x24gb": 14.7,
}
"""GiB that the rank with most of them stores."""


def dry(recipe: str, folder: Path, gpu: str, *overrides: str, layers: int | None = None) -> DryRun:
    model = write_config(recipe, folder, layers)
    return dry_run(load_config(recipe_path(recipe), [f"model.path={model}", *overrides]), find_gpu(gpu))


def check_steps(found: DryRun) -> None:
    """Both kinds of steps run in every mode with our attention, and decodes are captured from one row per slice on."""
    modes = found.config.parallel.available_modes
    assert found.attention.name == "triton"
    assert set(found.prefills) == set(found.decodes) == set(found.buckets) == set(modes)
    for mode in modes:
        prefill, decodes = found.prefills[mode], found.decodes[mode]
        assert isinstance(prefill, StepLaunches), prefill
        assert not isinstance(decodes, str), decodes
        assert len(prefill.marks) == found.rank.model.shape.num_layers
        assert sorted(decodes) == found.buckets[mode]
        assert min(decodes) == mode.sp
        assert min(step.exchanges_per_layer for step in (prefill, *decodes.values())) >= 2


def gpu_of(recipe: str) -> str:
    return {"8xh200": "h200", "8xh100": "h100"}.get(recipe.rpartition("-")[2], "rtx4090")


@pytest.mark.parametrize("recipe", MODELS)
def test_every_recipe_runs_on_meta_in_both_modes_and_is_captured(recipe: str, tmp_path: Path) -> None:
    layers = 4 if "llama-4" in recipe else 2  # every fourth layer of Scout is of another kind
    found = dry(recipe, tmp_path, gpu_of(recipe), LESS, layers=layers)

    check_steps(found)


@pytest.mark.thorough
@pytest.mark.parametrize("recipe", MODELS)
def test_every_recipe_fits_with_all_layers(recipe: str, tmp_path: Path) -> None:
    found = dry(recipe, tmp_path, gpu_of(recipe))

    check_steps(found)
    assert found.rank.budget.weights / GIB == pytest.approx(WEIGHTS[recipe], abs=0.1)
    assert found.rank.worker.cache.num_bytes > 0


@pytest.mark.thorough
@pytest.mark.parametrize("recipe", [name for name in MODELS if name.endswith("h200")])
def test_recipes_for_h200_fit_on_h100_except_the_one_that_says_so(recipe: str, tmp_path: Path) -> None:
    if recipe == "llama-3.3-70b-fp8-8xh200":
        with pytest.raises(ConfigError, match="less than one request of max_model_len 131072"):
            dry(recipe, tmp_path, "h100")
        return
    check_steps(dry(recipe, tmp_path, "h100"))


def test_dense_recipes_capture_decodes_and_small_steps_with_prompts(tmp_path: Path) -> None:
    found = dry("qwen3-32b-fp8-8xh200", tmp_path, "h200", layers=2)

    assert found.buckets[Mode(8, 1)][0] == 8
    assert found.buckets[Mode(1, 8)][:4] == [1, 2, 4, 8]
    assert {sizes[-1] for sizes in found.buckets.values()} == {1024}
    assert {sizes[-1] for sizes in found.mixed_sizes.values()} == {1024}
    captured = {(mode, size) for mode, sizes in found.mixed_sizes.items() for size in sizes}
    assert set(found.rank.capturer.mixed) == captured
    assert max(step.kernels_per_layer for step in found.rank.capturer.mixed.values()) <= 12


def test_an_fp8_cache_takes_half_and_is_served_by_the_same_kernel(tmp_path: Path) -> None:
    found = {}
    for dtype in ("auto", "fp8"):
        run = dry("qwen3-32b-yarn-128k-8xh200", tmp_path, "h200", f"cache.dtype={dtype}", LESS, layers=2)
        check_steps(run)
        found[dtype] = run.rank.worker.cache.shape
    assert found["fp8"].dtype == torch.float8_e4m3fn
    assert found["fp8"].bytes_per_block * 2 == found["auto"].bytes_per_block


def test_the_table_names_what_a_start_decides(tmp_path: Path) -> None:
    found = dry("qwen3-30b-a3b-8xh200", tmp_path, "h100", layers=2)
    text, titles = render(found), [section.title for section in sections(found)]

    assert titles == [
        "model",
        "memory per rank",
        "attention",
        "collectives",
        "CUDA graphs",
        "launches",
        "kernels of a layer of the smallest decode",
        "prefill",
        "log of the start",
    ]
    for words in (
        "Qwen3MoeForCausalLM: 2 layers",
        "8 x H100 80 GB, 79.65 GiB, sm_90",
        "32 query and 4 KV; per rank 4 and 1, each KV head on 2 ranks",
        "128 in 2 layers, placed by replicate",
        "full  2 layers",
        "8192 tokens a step, 1024 on each rank",
        "40960 tokens in 5 steps",
    ):
        assert words in text
    assert all(line == line.rstrip() and len(line) <= 120 for line in text.splitlines())


def test_columns_are_aligned(tmp_path: Path) -> None:
    text = render(dry("qwen3-8b-2x24gb", tmp_path, "rtx4090", layers=2))
    memory = text.split("memory per rank\n")[1].split("\n\n")[0].splitlines()

    assert len({line.index("GiB") - len(line.split("GiB")[0].split()[-1]) for line in memory}) == 1


def test_a_model_that_does_not_fit_is_one_line_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the model does not fit: 1\.31 GiB .* weights \d\.\d\d GiB") as raised:
        dry("qwen3-32b-fp8-8xh200", tmp_path, "h200", "cache.memory_utilization=0.02", layers=2)
    assert "\n" not in str(raised.value)


def test_refused_attention_is_an_error_as_at_a_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention_backend is flash_attn, but"):
        dry("qwen3-8b-2x24gb", tmp_path, "rtx4090", "runtime.attention_backend=flash_attn", layers=2)


def test_eager_runs_capture_nothing(tmp_path: Path) -> None:
    found = dry("qwen3-8b-2x24gb", tmp_path, "rtx4090", "runtime.enforce_eager=true", layers=2)

    assert found.buckets == {}
    assert "runtime.enforce_eager is true" in render(found)
    assert set(found.decodes[Mode(2, 1)]) == {2}


@pytest.mark.thorough
def test_host_memory_and_disk_space_of_evicted_blocks_are_listed(tmp_path: Path) -> None:
    sizes = [f"cache.offload_host_bytes={8 * GIB}", f"cache.offload_disk_bytes={64 * GIB}"]
    options = [*sizes, "cache.offload_disk_folder=/mnt/nvme", "runtime.enforce_eager=true"]
    found = dry("qwen3-8b-2x24gb", tmp_path, "rtx4090", *options, layers=2)
    slots, block = found.rank.tier.host_slots[0], found.rank.worker.cache.shape.bytes_per_block
    assert 8 * GIB - block < slots * block <= 8 * GIB
    memory = next(section for section in sections(found) if section.title == "memory per rank")
    cells = {row[0]: row[1:] for row in memory.rows}
    assert cells["host"] == ("8.00 GiB", f"pinned, for {slots * 16:,} tokens of evicted blocks")
    assert cells["disk"] == ("64.00 GiB", f"for {found.rank.tier.disk_slots[0] * 16:,} tokens more")
    assert cells["copies"][0] == "0.03 GiB"


def test_without_a_gpu_one_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ConfigError, match="give --gpu, as in --gpu h200"):
        own_gpu()


def test_unknown_gpus_are_one_line_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="--gpu h20o: unknown; the nearest is h20 ") as raised:
        find_gpu("h20o")
    assert "\n" not in str(raised.value)
    assert find_gpu("RTX 4090").capability == (8, 9)
    assert all(find_gpu(name).memory > 16 * GIB for name in TABLE)


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_the_flag_needs_no_prompt_and_no_ranks(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = write_config("qwen3-8b-2x24gb", tmp_path, layers=2)
    words = [command, "--config", str(recipe_path("qwen3-8b-2x24gb")), "--dry-run", "--gpu", "l40s"]
    parsed = parse([*words, f"model.path={model / 'config.json'}"])

    assert parsed.is_dry
    run_command(parsed.options, parsed.config())
    assert "2 x L40S" in capsys.readouterr().out


def test_the_flag_is_refused_on_ranks_of_a_launcher() -> None:
    with pytest.raises(ConfigError, match="run it without a launcher"):
        run_rank(parse(["generate", "m", "--dry-run"]), 0, None)


def test_a_gpu_is_only_for_dry_runs() -> None:
    with pytest.raises(ConfigError, match="--gpu is for --dry-run"):
        parse(["generate", "m", "--prompt", "x", "--gpu", "h200"])


@pytest.mark.parametrize("path", ["no/such/folder", "/no/such/folder", "README.md"])
def test_a_model_without_config_is_one_line(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _refuse)

    with pytest.raises(CheckpointError, match=r"no folder, config\.json or hub id|has no config\.json"):
        read_config_only(ModelConfig(path=path))


def test_a_hub_id_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _refuse)

    with pytest.raises(CheckpointError, match="could not be loaded from the hub") as raised:
        read_config_only(ModelConfig(path="owner/name"))
    assert "\n" not in str(raised.value)


def _refuse(*_: object, **__: object) -> None:
    raise OSError("no network\nhere")


@pytest.mark.parametrize("ranks", ["all", pytest.param("first", marks=pytest.mark.thorough)])
def test_the_memory_of_a_draft_model_is_counted(ranks: str, tmp_path: Path) -> None:
    draft = write_config("qwen3-8b-2x24gb", tmp_path / "draft", 1)
    found = dry(
        "qwen3-14b-2x24gb",
        tmp_path / "served",
        "rtx4090",
        LESS,
        "speculation.method=draft_model",
        f"speculation.model={draft}",
        f"speculation.draft_ranks={ranks}",
        layers=2,
    )
    worker = found.rank.worker
    assert isinstance(worker.drafter, DraftModel)
    drafting = worker.drafter.worker
    assert found.rank.budget.draft > drafting.cache.num_bytes + drafting.model.weight_bytes
    assert drafting.groups.layout.world_size == (2 if ranks == "all" else 1)
    assert drafting.cache.num_blocks == pytest.approx(worker.cache.num_blocks, rel=0.05)
    assert isinstance(drafting.graphs, CudaGraphRunner)
    text = render(found)
    assert f"Qwen3ForCausalLM: 1 layers, on {'all ranks' if ranks == 'all' else 'the first rank'}" in text
    assert "a cache of as many tokens" in text


WEIGHTS_OF_LAYER = 192 * (192 + 48 + 48 + 192 + 3 * 160)
OUTPUTS_OF_LAYER = 192 + 48 + 48 + 192 + 2 * 160 + 192
QUANTISED_BYTES = {"int8": WEIGHTS_OF_LAYER + 4 * OUTPUTS_OF_LAYER, "int4": WEIGHTS_OF_LAYER * (1 / 2 + 4 / 32)}
"""Of one layer: a float32 scale per output; half a byte per weight, and a scale and a zero point per 32."""


@pytest.mark.parametrize(
    ("quantize", "sp", "tp"),
    [
        ("int4", 1, 2),
        *(
            pytest.param(quantize, *sizes, marks=pytest.mark.thorough)
            for quantize, *sizes in (
                ("int4", 1, 1),
                ("int4", 2, 1),
                ("int8", 1, 1),
                ("int8", 2, 1),
                ("int8", 1, 2),
            )
        ),
    ],
)
def test_weights_quantised_while_loading_take_the_counted_bytes(
    quantize: str, sp: int, tp: int, tmp_path: Path
) -> None:
    tiny_llama(tmp_path, tokenizer=False, hidden_size=192, head_dim=24, intermediate_size=160, num_hidden_layers=1)
    overrides = [f"model.path={tmp_path}", f"model.quantize={quantize}", "model.quantize_group_size=32", LESS]
    config = load_config(None, [*overrides, f"parallel.sp={sp}", f"parallel.tp={tp}", "runtime.enforce_eager=true"])
    counted, layout = dry_run(config, find_gpu("h200")).rank.model.weight_bytes, config.parallel.layout
    ranks = [
        ModelBuilder.from_folder(tmp_path, config.model, layout, shard, torch.device("cpu")).load()
        for shard in range(layout.world_size)
    ]
    assert counted == max(rank.weight_bytes for rank in ranks)
    for rank in ranks:
        layers = {id(own): own for own in rank.module.model.layers.parameters()}.values()
        stored = {own.untyped_storage().data_ptr(): own.untyped_storage().nbytes() for own in layers}
        assert sum(stored.values()) == sum(own.nbytes for own in layers), "nothing larger is kept behind a view"
        if tp == 1:
            assert sum(own.nbytes for own in layers) == QUANTISED_BYTES[quantize] + 2 * 4 * 192


@pytest.mark.thorough
def test_a_head_is_said_not_to_be_counted(tmp_path: Path) -> None:
    found = dry("qwen3-8b-2x24gb", tmp_path, "rtx4090", LESS, "speculation.method=mtp", layers=1)
    assert "draft head" in render(found)
