"""The demo model's tool, on real ranks: it learns, Ulysses changes nothing, and what it writes loads."""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.launcher import ROOT
from tests.ranks import start_forked
from tools.demo_corpus import ROLES, SYSTEM_PROMPT, render_chat, turn, with_system_prompt
from tools.demo_recipe import load_recipe, parse_arguments
from ulysses_infer.job.processes import free_port

STEPS = 16
SECONDS = 120
TINY = [
    "corpus.max_files=12",
    "corpus.vocab_size=384",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.head_dim=16",
    "train.seq_length=64",
    "train.micro_batch=8",
    "train.warmup_steps=4",
    "train.learning_rate=1e-2",
    "train.eval_batches=2",
    "train.log_every=1",
    "parallel.dtype=fp32",
]


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    model: Path
    log: list[dict[str, float]]

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by step."""
        return {line["step"]: line["loss"] for line in self.log if "loss" in line}


class Ranks:
    """The tool on `world` ranks, started as the launcher would start them, without its delays and their imports."""

    def __init__(self, world: int, folder: Path, *overrides: str) -> None:
        self.folder = folder
        arguments = [*TINY, f"output_dir={folder / 'model'}", f"run_dir={folder / 'run'}", *overrides]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        self.output = folder / "output.txt"
        self.processes = [start_forked(run_tool, arguments, meeting, rank, self.output) for rank in range(world)]

    def finish(self) -> Run:
        """Wait for every rank; a failed one ends the others and the test, with its output."""
        try:
            for process in self.processes:
                process.join(SECONDS)
                assert process.exitcode == 0, self.output.read_text()
        finally:
            for process in self.processes:
                process.kill()
        log = (self.folder / "run" / "log.jsonl").read_text().splitlines()
        return Run(self.folder / "model", [json.loads(line) for line in log])


def run_tool(arguments: list[str], meeting: dict[str, str], rank: int, output: Path) -> None:
    """What the process of a rank does."""
    with output.open("ab", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ.update(meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"})
    program = str(ROOT / "tools" / "train_demo_model.py")
    sys.argv = [program, f"--local_rank={rank}", *arguments]
    runpy.run_path(program, run_name="__main__")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """The same training with sequence parallelism 1 and 2, side by side, because both mostly import."""
    started = {world: Ranks(world, tmp_path_factory.mktemp(f"sp{world}"), f"train.steps={STEPS}") for world in (1, 2)}
    return {world: ranks.finish() for world, ranks in started.items()}


def test_loss_falls(runs: dict[int, Run]) -> None:
    losses = list(runs[2].losses.values())
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.3
    assert runs[2].log[-1]["eval_loss"] < losses[0]


def test_two_ranks_train_as_one(runs: dict[int, Run]) -> None:
    alone, shared = runs[1].losses, runs[2].losses
    assert shared == pytest.approx(alone, rel=1e-4)
    assert runs[2].log[-1]["eval_loss"] == pytest.approx(runs[1].log[-1]["eval_loss"], rel=1e-4)


def test_result_is_an_ordinary_model_folder(runs: dict[int, Run]) -> None:
    model = AutoModelForCausalLM.from_pretrained(runs[2].model)
    tokenizer = AutoTokenizer.from_pretrained(runs[2].model)
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|end|>") in model.generation_config.eos_token_id
    tokens = tokenizer("def f(x):\n    return x", return_tensors="pt")
    loss = model(**tokens, labels=tokens["input_ids"]).loss
    assert loss < math.log(len(tokenizer))
    assert "16 of 16 steps" in (runs[2].model / "README.md").read_text()


def test_chat_template_is_what_was_trained(runs: dict[int, Run]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(runs[2].model)
    chat = with_system_prompt(turn("What does len do?", "Return the number of items in a container."))
    assert chat[0]["content"] == SYSTEM_PROMPT
    assert tokenizer.apply_chat_template(chat, tokenize=False) == render_chat(chat)
    prompt = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(prompt) == render_chat(chat[:2]) + "<|assistant|>\n"
    assert prompt.count(tokenizer.convert_tokens_to_ids(ROLES[1])) == 1


def test_resume_continues_after_the_last_checkpoint(runs: dict[int, Run]) -> None:
    folder = runs[1].model.parent
    resumed = Ranks(1, folder, f"train.steps={STEPS + 2}", "train.resume=true").finish()
    added = resumed.log[len(runs[1].log) :]
    assert [line["step"] for line in added] == [STEPS + 1, STEPS + 2, STEPS + 2]
    assert added[0]["loss"] < runs[1].losses[1] - 0.3


def test_command_line_overrides_the_recipe_and_the_launcher_may_add_its_rank(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train: {steps: 7, micro_batch: 3}")
    recipe = parse_arguments("", ["--local_rank=1", "--config", str(tmp_path / "recipe.yaml"), "train.steps=9"])
    assert (recipe.train.steps, recipe.train.micro_batch, recipe.train.seq_length) == (9, 3, 1024)


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(SystemExit, match=r"unknown key 'train\.step'; did you mean 'train\.steps'\?"):
        load_recipe(None, ["train.step=3"])


def test_shipped_recipe_is_valid() -> None:
    recipe = load_recipe(str(ROOT / "recipes" / "train_demo.yaml"), [])
    assert recipe.output_dir == "models/demo"
