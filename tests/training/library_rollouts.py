"""What the tests of several RL libraries' rollouts share: what is greedy, on how many ranks, and jobs on Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "models/demo")
RAY = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_memory_monitor_refresh_ms": "0",  # else Ray ends workers when other programs take the memory
    "RAY_worker_niceness": "0",  # by default Ray's workers yield to all other processes
}
JOB_SECONDS = 850.0
Test = Callable[..., None]


def on_one_and_two_ranks(test: Test) -> Test:
    """Run a test, which takes `num_ranks`, with each number."""
    ranks = pytest.mark.parametrize("num_ranks", [1, 2])
    return pytest.mark.thorough(pytest.mark.distributed(ranks(test)))


def on_a_ray_cluster(test: Test) -> Test:
    """Mark a test that calls `run_job`."""
    return pytest.mark.thorough(pytest.mark.distributed(pytest.mark.timeout(JOB_SECONDS + 50)(test)))


def run_job(module: str, *arguments: str, **variables: str) -> Any:
    """Run a program that starts a Ray cluster; returns the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **RAY, **variables},
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def demo_model(scale: float = 1.0) -> Any:
    """The demo model in float32, its weights times `scale`."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    model.load_state_dict({name: tensor * scale for name, tensor in model.state_dict().items()})
    return model


def check_greedy(model: Any, prompt: list[int], tokens: list[int], logprobs: Sequence[float]) -> None:
    """`tokens` are the model's most probable ones after `prompt`, with its log-probabilities."""
    with torch.no_grad():
        rows = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    assert tokens == rows.argmax(-1).tolist()
    assert list(logprobs) == pytest.approx(rows.amax(-1).tolist(), abs=1e-4)
