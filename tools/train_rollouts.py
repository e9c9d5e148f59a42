"""Reinforcement learning on one set of ranks: generate, score, train, update the engine's weights.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 2 tools/train_rollouts.py \
        --config recipes/train_rollouts.yaml [train.steps=20 ...]

Each step samples completions of a few prompts, rewards each with the share of its tokens that contain certain
characters, and trains by policy gradient with the advantage of GRPO (Shao et al., 2024): the baseline is the mean
reward of a prompt's completions. It needs no clipping, because each sample is used for a single step.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import AutoModelForCausalLM, AutoTokenizer

if not __package__:  # started by path, as the deepspeed launcher does
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.demo_recipe import parse_arguments
from ulysses_infer import RequestOutput, SamplingParams, init_inference
from ulysses_infer.errors import UlyssesError
from ulysses_infer.job.lifetime import end_with_launcher
from ulysses_infer.model.loading.files import resolve_folder


@dataclass
class RolloutConfig:
    """What is generated, and its reward."""

    prompts: list[str] = field(default_factory=lambda: ["import "])
    samples: int = 6
    max_tokens: int = 24
    characters: str = "e"
    threshold_tokens: int = 64  # steps with more tokens run in SP mode


@dataclass
class TrainConfig:
    """The optimizer's steps."""

    steps: int = 12
    learning_rate: float = 1e-3
    grad_clip: float = 1.0
    seed: int = 0
    sleep_level: int = 2


@dataclass
class ParallelConfig:
    """How the ranks share training."""

    sequence_parallel: int | None = None  # None: all ranks work on each sequence
    zero_stage: int = 2


@dataclass
class Recipe:
    """The whole recipe, as recipes/train_rollouts.yaml spells it."""

    model: str = "models/demo"
    output_dir: str | None = None
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


class Loop:
    """One rank's part of the run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.rollouts, self.train = recipe, recipe.rollouts, recipe.train
        self.rows = len(self.rollouts.prompts) * self.rollouts.samples
        self.sequence_parallel = recipe.parallel.sequence_parallel or dist.get_world_size()
        self.trainer = self.make_trainer()
        self.engine = self.make_engine()
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
        texts = [tokenizer.decode([token]) for token in range(self.engine.vocab_size)]
        self.counts = [any(c in text for c in self.rollouts.characters) for text in texts]

    def make_trainer(self) -> Any:
        """The DeepSpeed engine, with attention through Ulysses' all-to-all."""
        torch.manual_seed(self.train.seed)
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.recipe.model, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.mpu = UlyssesSPAttentionHF.register_with_transformers(
            model, "sdpa", sequence_parallel_size=self.sequence_parallel, micro_batch_size=self.rows
        )
        stage = self.recipe.parallel.zero_stage
        config = {
            "train_micro_batch_size_per_gpu": self.rows,
            "gradient_clipping": self.train.grad_clip,
            "sequence_parallel_size": self.sequence_parallel,
            # ZeRO-3's reduce-scatter ignores sequence_parallel_size when it averages (DeepSpeed 0.19.8).
            "zero_optimization": {"stage": stage, "reduce_scatter": stage < 3},
            "steps_per_print": sys.maxsize,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.train.learning_rate, betas=(0.9, 0.95))
        return deepspeed.initialize(model=model, optimizer=optimizer, mpu=self.mpu, config=config)[0]

    def make_engine(self) -> Any:
        """The inference engine, on the training's ranks and with its weights."""
        config = {
            "model": {"max_model_len": 256},
            "policy": {"name": "threshold", "threshold_tokens": self.rollouts.threshold_tokens},
            "scheduler": {"max_num_seqs": self.rows},
            "cache": {"num_blocks": 16 * self.rows},
        }
        return init_inference(self.trainer, config)

    def run(self) -> list[float]:
        """Run all steps; returns the mean reward of each."""
        rewards = []
        for step in range(self.train.steps):
            started = time.perf_counter()
            outputs = self.generate(seed=self.train.seed * self.train.steps + step)
            generated = time.perf_counter()
            mean = self.learn(outputs)
            self.log(
                step=step,
                reward=round(mean, 4),
                modes=list(self.engine.stats()["modes"]),
                generate_seconds=round(generated - started, 2),
                train_seconds=round(time.perf_counter() - generated, 2),
            )
            rewards.append(mean)
        return rewards

    def generate(self, seed: int) -> list[RequestOutput]:
        """`samples` completions of every prompt, with the current weights."""
        params = SamplingParams(
            n=self.rollouts.samples,
            temperature=1.0,
            max_tokens=self.rollouts.max_tokens,
            ignore_eos=True,
            seed=seed,
            detokenize=False,
        )
        outputs: list[RequestOutput] = self.engine.generate(self.rollouts.prompts, params)
        return outputs

    def learn(self, outputs: list[RequestOutput]) -> float:
        """Take one optimizer step on `outputs` and update the engine's weights; returns the mean reward."""
        rewards = torch.tensor([[self.reward(c.token_ids) for c in output.outputs] for output in outputs])
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        if self.train.sleep_level:
            self.engine.sleep(self.train.sleep_level)
        self.trainer.backward(self.loss(outputs, advantages.flatten()))
        self.trainer.step()
        self.engine.update_weights(self.trainer)
        self.engine.wake_up()
        return float(rewards.mean())

    def reward(self, token_ids: list[int]) -> float:
        """The share of tokens that contain one of the characters."""
        return sum(self.counts[token] for token in token_ids) / len(token_ids)

    def loss(self, outputs: list[RequestOutput], advantages: torch.Tensor) -> torch.Tensor:
        """This rank's term of the loss; DeepSpeed sums the gradients of an SP group. advantages: [rows]."""
        tokens, weights = self.batch(outputs, advantages)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        labels = F.pad(tokens, (0, 1))[:, 1:]
        weights = F.pad(weights, (0, 1))[:, 1:]
        count = (weights != 0).sum().clamp(min=1)
        inputs, places, labels, weights = (self.mine(rows) for rows in (tokens, positions, labels, weights))
        logits = self.trainer(input_ids=inputs, position_ids=places, use_cache=False).logits.float()
        nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return (nats * weights.flatten()).sum() / count

    def batch(self, outputs: list[RequestOutput], advantages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts and completions, padded to a length divisible by SP, and each token's weight: both [rows, n]."""
        texts = [(o.prompt_token_ids, c.token_ids) for o in outputs for c in o.outputs]
        longest = max(len(prompt) + len(completion) for prompt, completion in texts)
        length = -(-longest // self.sequence_parallel) * self.sequence_parallel
        tokens, weights = torch.zeros(len(texts), length, dtype=torch.int64), torch.zeros(len(texts), length)
        for row, ((prompt, completion), advantage) in enumerate(zip(texts, advantages, strict=True)):
            end = len(prompt) + len(completion)
            tokens[row, :end] = torch.tensor([*prompt, *completion])
            weights[row, len(prompt) : end] = advantage
        return tokens, weights

    def mine(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's slice of each sequence."""
        index = self.mpu.get_sequence_parallel_rank() if self.mpu is not None else 0
        return rows.chunk(self.sequence_parallel, dim=1)[index].to(self.trainer.device)

    def log(self, **values: Any) -> None:
        """Print one JSON line on rank 0."""
        if self.engine.is_first:
            print(json.dumps(values), flush=True)

    def save(self, folder: str) -> None:
        """Save the trained model as a Hugging Face folder."""
        parameters = list(self.trainer.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.recipe.parallel.zero_stage == 3):
            if self.engine.is_first:
                self.trainer.module.save_pretrained(folder)
                self.engine.tokenizer.save_pretrained(folder)
        dist.barrier()


def main(argv: list[str]) -> None:
    """Entry point of every rank."""
    end_with_launcher()
    recipe = parse_arguments(__doc__.split("\n")[0], argv, Recipe)
    try:
        recipe.model = str(resolve_folder(recipe.model, None))
    except UlyssesError as error:
        sys.exit(f"error: {error}")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it would take a minute
    deepspeed.init_distributed()
    loop = Loop(recipe)
    with loop.engine:
        rewards = loop.run()
        loop.log(first=round(rewards[0], 4), last=round(rewards[-1], 4))
        if recipe.output_dir is not None:
            loop.save(recipe.output_dir)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
