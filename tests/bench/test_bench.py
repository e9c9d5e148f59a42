"""A whole offline benchmark on two ranks, and the checkpoint with random weights it can run on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.caches import empty_cache
from ulysses_infer.bench import offline as bench
from ulysses_infer.bench.random_model import SHAPES, random_model
from ulysses_infer.cli.arguments import parse
from ulysses_infer.errors import ConfigError

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(SHAPES, "llama-60m", TINY)
    monkeypatch.setenv("XDG_CACHE_HOME", empty_cache(tmp_path))
    return random_model("llama-60m")


def test_random_model_is_made_once(tiny_model: Path) -> None:
    weights = tiny_model / "model.safetensors"
    made = weights.stat().st_mtime_ns

    assert random_model("llama-60m") == tiny_model
    assert weights.stat().st_mtime_ns == made


def test_random_model_of_another_shape_is_made_again(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "llama-60m", {**TINY, "vocab_size": 80})

    assert json.loads((random_model("llama-60m") / "config.json").read_text())["vocab_size"] == 80


def test_unknown_random_model_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llama-60m, llama-0\.5b"):
        random_model("llama-1t", tmp_path / "x")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "modes", [["shift", "single"], pytest.param(["tp", "sp", "shift", "single"], marks=pytest.mark.thorough)]
)
def test_all_modes_are_measured_in_one_run(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], modes: list[str]
) -> None:
    file = tmp_path / "measured.json"
    sizes = [
        "--input-len",
        "20",
        "--output-len",
        "4",
        "--num-prompts",
        "2",
        "--repeats",
        "2",
        "--modes",
        ",".join(modes),
    ]
    keys = ["parallel.sp=2", "policy.threshold_tokens=8", "runtime.threads_per_rank=1", "runtime.device=cpu"]
    command = parse(["bench", "throughput", "--random-model", "llama-60m", *sizes, "--json", str(file), *keys])

    bench.run(command.options, command.config(), rank=0)

    record = json.loads(file.read_text())
    assert list(record["modes"]) == modes
    assert all(len(mode["total_token_throughput"]) == 2 for mode in record["modes"].values())
    assert max(mode["total_token_throughput_of_best"] for mode in record["modes"].values()) == 1.0
    printed = capfd.readouterr().out
    assert "single  1 rank, 2 threads" in printed


@pytest.mark.distributed
@pytest.mark.thorough
def test_rollouts_report_the_makespan_and_what_switching_can_gain(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "measured.json"
    sizes = ["--input-len", "8", "--output-len", "4", "--num-prompts", "3", "--samples", "2", "--repeats", "2"]
    keys = ["parallel.sp=2", "policy.threshold_tokens=8", "runtime.threads_per_rank=1", "runtime.device=cpu"]
    options = [*sizes, "--json", str(file), *keys, "policy.calibration_seconds=2"]
    command = parse(["bench", "rollouts", "--random-model", "llama-60m", *options])

    bench.run(command.options, command.config(), rank=0)

    record = json.loads(file.read_text())
    assert list(record["modes"]) == ["tp", "sp", "shift", "adaptive"]
    assert (record["samples"], record["tail"]) == (2, 1.0)
    assert min(mode["makespan_of_best"] for mode in record["modes"].values()) == 1.0
    sizes_of = {mode: [(step["most_tokens"], step["steps"]) for step in own] for mode, own in record["steps"].items()}
    assert sizes_of["tp"] == sizes_of["sp"] == sizes_of["shift"]
    printed = capfd.readouterr().out
    assert "best static mode" in printed
    assert "adaptive: " in printed
