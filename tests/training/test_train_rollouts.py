"""The reinforcement example: generation and training in turns on the same ranks, and the reward rises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher import ROOT, environment
from tools.demo_recipe import load_recipe
from tools.train_rollouts import Recipe, main
from ulysses_infer.job.processes import free_port

RECIPE = "recipes/train_rollouts.yaml"


def test_shipped_recipe_is_valid():
    recipe = load_recipe(str(ROOT / RECIPE), [], Recipe)
    assert (ROOT / recipe.model / "config.json").is_file()
    assert recipe.train.steps >= 10


@pytest.mark.parametrize("config", [str(ROOT / RECIPE), None])
def test_the_model_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(config, [], Recipe).model == str(ROOT / "models" / "demo")
    (tmp_path / "mine").mkdir()
    assert load_recipe(config, ["model=mine"], Recipe).model == str(tmp_path / "mine")


def test_a_model_or_recipe_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tools.train_rollouts.end_with_launcher", lambda: None)
    with pytest.raises(SystemExit, match=r"^error: model.path '/nowhere/m' is neither a folder[^\n]*$"):
        main(["--config", str(ROOT / RECIPE), "model=/nowhere/m"])
    with pytest.raises(SystemExit, match=r"^recipe 'none.yaml' does not exist[^\n]*$"):
        main(["--config", "none.yaml"])


@pytest.mark.thorough
@pytest.mark.launcher
@pytest.mark.distributed
def test_the_reward_rises(tmp_path: Path):
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port()), "--num_gpus", "2"]
    changes = ["train.steps=8", "rollouts.max_tokens=16", "parallel.zero_stage=3", f"output_dir={tmp_path}"]
    done = subprocess.run(
        [*launcher, "tools/train_rollouts.py", "--config", RECIPE, *changes],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step"')]
    rewards = [step["reward"] for step in steps]
    assert len(rewards) == 8
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05
    assert set(steps[-1]["modes"]) == {"sp2xtp1", "sp1xtp2"}
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "tokenizer.json").is_file()
