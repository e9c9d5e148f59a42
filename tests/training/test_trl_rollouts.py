"""Rollouts for TRL's trainers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import settings, tiny_llama
from tests.training.library_rollouts import check_greedy
from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.job.processes import free_port
from ulysses_infer.rl.trl import RolloutFunc, UlyssesGeneration

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 9], [7, 8, 9, 10], [7, 8, 9, 10], [11]]


def accelerator_of(num_processes: int = 1, index: int = 0) -> Any:
    """What is used of accelerate's."""
    return SimpleNamespace(
        num_processes=num_processes,
        process_index=index,
        is_main_process=index == 0,
        device=torch.device("cpu"),
        unwrap_model=lambda model, keep_torch_compile: model,
        wait_for_everyone=lambda: None,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("trl")
    tiny_llama(made)
    return str(made)


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def check_completions(model: Any, prompts: list[list[int]], found: Any) -> None:
    """Greedy completions and the model's own log-probabilities of them."""
    assert found.prompt_ids == prompts
    for prompt, completion, scores in zip(prompts, found.completion_ids, found.logprobs, strict=True):
        check_greedy(model, prompt, completion, [each[0] for each in scores])


GREEDY = {"temperature": 0.0, "max_completion_length": 5, "generation_kwargs": {"ignore_eos": True}}


def generate_on_rank(folder: str) -> Any:
    """On a rank: completions before and after new weights, with sleep in between."""
    import torch.distributed as dist

    rank, count = dist.get_rank(), dist.get_world_size()
    model = load(folder)
    own = PROMPTS[: 3 - rank]
    generation = UlyssesGeneration(
        model, accelerator_of(count, rank), None, enable_sleep_mode=True, **GREEDY, **_small(settings())
    )
    before = generation.generate(own, None, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(-1))
    generation.sync_weights()
    after = generation.generate(own, None, 1)
    generation.shutdown()
    return own, before, after


def _small(changes: dict[str, Any]) -> dict[str, Any]:
    """Settings without the layout, which the processes determine."""
    return {key: value for key, value in changes.items() if not key.startswith("parallel.")}


@pytest.mark.distributed
def test_every_process_gets_the_completions_of_its_prompts_with_the_latest_weights(folder: str, rank_pool: Any) -> None:
    changed = load(folder)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.copy_(parameter.flip(-1))
    for own, before, after in rank_pool(2).run(generate_on_rank, folder):
        check_completions(load(folder), own, before)
        check_completions(changed, own, after)


def test_copies_of_a_prompt_differ_and_a_seed_repeats_them(folder: str) -> None:
    model = load(folder)

    def sample(seed: int) -> Any:
        options = {"temperature": 1.5, "logprobs": 2, "generation_kwargs": {"seed": seed, "ignore_eos": True}}
        generation = UlyssesGeneration(model, accelerator_of(), None, **options, **_small(settings()))
        found = [generation.generate([PROMPTS[0]] * 3, None, 3) for _ in range(2)]
        generation.shutdown()
        return found

    first, again, other = sample(1), sample(1), sample(2)
    assert first == again != other
    completions = [tuple(ids) for found in first for ids in found.completion_ids]
    assert len(set(completions)) == len(completions)
    for found in first:
        for ids, tokens, scores in zip(found.completion_ids, found.logprob_token_ids, found.logprobs, strict=True):
            assert all(token in candidates for token, candidates in zip(ids, tokens, strict=True))
            assert all(each == sorted(each, reverse=True) for each in scores)


def train(folder: str, output: Path, steps: int, **settings: Any) -> tuple[Any, list[Any]]:
    """TRL's trainer after some steps, and the rollouts of each with the weights that they came from."""
    from tools.train_grpo import make_trainer

    seen: list[Any] = []
    rollouts = RolloutFunc()

    def recorded(prompts: list[str], trainer: Any) -> dict[str, Any]:
        found = rollouts(prompts, trainer)
        seen.append((found, {name: value.clone() for name, value in trainer.model.state_dict().items()}))
        return found

    trainer = make_trainer(folder, steps, 4, str(output), recorded, **settings)
    trainer.train()
    rollouts.shutdown()
    return trainer, seen


def test_importance_ratios_between_rollout_and_training_are_one(tmp_path: Path) -> None:
    trainer, seen = train(str(ROOT / "models/demo"), tmp_path, 2, temperature=0.9, top_k=0)
    assert len(seen) == 2
    assert any(not torch.equal(seen[0][1][name], seen[1][1][name]) for name in seen[0][1])
    model = trainer.model.eval()
    for found, weights in seen:
        model.load_state_dict(weights)
        for prompt, completion, logprobs in zip(*(found[key] for key in found), strict=True):
            with torch.no_grad():
                rows = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.9
            trained = rows.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            ratios = (trained - torch.tensor(logprobs)).exp()
            assert (ratios - 1).abs().max() < 1e-3


@pytest.mark.thorough
def test_rewards_rise_under_trls_trainer(tmp_path: Path) -> None:
    trainer, _ = train(str(ROOT / "models/demo"), tmp_path, 12)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3])


@pytest.mark.thorough
@pytest.mark.distributed
def test_two_processes_of_accelerate_train(tmp_path: Path) -> None:
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port"]
    script = ["tools/train_grpo.py", "--steps", "2", "--samples", "2", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, str(free_port()), *script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "reward per step: " in done.stdout


def test_wrong_arguments_are_refused_in_one_line(folder: str) -> None:
    model = load(folder)
    with pytest.raises(ConfigError, match="mode is 'remote'; use colocate or server"):
        UlyssesGeneration(model, accelerator_of(), None, mode="remote")
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3; use a divisor of the 2 processes"):
        UlyssesGeneration(model, accelerator_of(2), None, tensor_parallel_size=3)
    with pytest.raises(ConfigError, match="admin_api_key is missing"):
        UlyssesGeneration(model, accelerator_of(), None, mode="server")
    generation = UlyssesGeneration(model, accelerator_of(), None, **_small(settings()))
    with pytest.raises(RequestError, match="only text prompts are served"):
        generation.generate(PROMPTS, [None, "picture", None, None], 1)
    generation.shutdown()
