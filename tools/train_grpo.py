"""GRPO with TRL's trainer, whose rollouts this engine generates on the training's own processes.

    python -m tools.train_grpo                                              # one process
    accelerate launch --cpu --num_processes 2 tools/train_grpo.py --steps 8

The demo model learns to write an "e": a completion's reward is the share of its characters that are one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # started by path, as accelerate does
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from ulysses_infer.rl.trl import RolloutFunc

PROMPTS = ["import ", "def test_", "The file is ", "class Parser", "    return ", "# Note: "]


def share_of_e(completions: list[str], **_: Any) -> list[float | None]:
    """The reward of each completion."""
    return [text.count("e") / max(len(text), 1) for text in completions]


def make_trainer(model: str, steps: int, samples: int, output: str, rollout_func: Any, **settings: Any) -> GRPOTrainer:
    """TRL's trainer for `samples` completions of a prompt per step. settings: of `GRPOConfig`."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    arguments = GRPOConfig(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=2 * samples,
        num_generations=samples,
        max_completion_length=24,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        beta=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **settings,
    )
    data = Dataset.from_dict({"prompt": PROMPTS * steps})
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=[share_of_e],
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        rollout_func=rollout_func,
    )


def main() -> None:
    """Train and print the reward of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=8, help="completions per prompt")
    parser.add_argument("--output", default="runs/grpo", help="folder of TRL's checkpoints")
    options = parser.parse_args()
    rollouts = RolloutFunc(policy={"name": "threshold", "threshold_tokens": 64})
    trainer = make_trainer(options.model, options.steps, options.samples, options.output, rollouts)
    trainer.train()
    rollouts.shutdown()
    if trainer.accelerator.is_main_process:
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        print("reward per step:", " ".join(f"{reward:.3f}" for reward in rewards))


if __name__ == "__main__":
    main()
