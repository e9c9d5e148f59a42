"""A decode step on this CPU with `torch.compile` and with the engine's CPU graph: step time and start-up time.

    python -m benchmarks.measure_compile MODEL [--threads 2] [--context 512] [--steps 50]

One request on the same checkpoint in bfloat16: transformers' forward with a static cache, eager and compiled, and a
step of the engine on one rank. The three alternate step by step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.arguments import common_options
from ulysses_infer import SamplingParams, init_inference

FIRST_TOKEN = 7  # arbitrary: times do not depend on tokens


class Transformers:
    """A decode step of transformers' model with a static cache."""

    def __init__(self, path: Path, context: int, num_steps: int, compiled: bool) -> None:
        from transformers import AutoModelForCausalLM, StaticCache

        started = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.cache = StaticCache(config=self.model.config, max_cache_len=context + num_steps + 2)
        self.token = torch.tensor([[FIRST_TOKEN]])
        self.position = context
        with torch.inference_mode():
            self.model(torch.full((1, context), FIRST_TOKEN), past_key_values=self.cache)
        self.forward: Callable[..., object] = torch.compile(self.model) if compiled else self.model
        self.step()
        self.step()
        self.ready_seconds = time.perf_counter() - started

    @torch.inference_mode()
    def step(self) -> None:
        """Generate one more token."""
        place = torch.tensor([self.position])
        output = self.forward(self.token, past_key_values=self.cache, position_ids=place[None], cache_position=place)
        self.token = output.logits[:, -1:].argmax(dim=-1)  # type: ignore[attr-defined]
        self.position += 1


class Ours:
    """A step of the engine. The third decode is the first that is replayed from its CPU graph."""

    def __init__(self, path: Path, context: int, num_steps: int, threads: int) -> None:
        started = time.perf_counter()
        blocks = -(-(context + num_steps + 8) // 16) + 1
        self.inference = init_inference(
            str(path),
            **{
                "model.dtype": "bfloat16",
                "model.max_model_len": 16 * blocks,
                "cache.num_blocks": blocks,
                "runtime.device": "cpu",
                "runtime.threads_per_rank": threads,
            },
        )
        engine = self.inference._engine
        assert engine is not None
        self.engine = engine
        params = SamplingParams(temperature=0, max_tokens=num_steps + 6, ignore_eos=True)
        engine.add([FIRST_TOKEN] * context, params)
        for _ in range(3):
            engine.step()
        self.ready_seconds = time.perf_counter() - started

    def step(self) -> None:
        """Generate one more token."""
        self.engine.step()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], parents=[common_options(threads=2, context=512, steps=50)]
    )
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    num_steps = options.steps + 4
    contenders: dict[str, Transformers | Ours] = {
        "transformers, eager": Transformers(options.model, options.context, num_steps, compiled=False),
        "transformers, torch.compile": Transformers(options.model, options.context, num_steps, compiled=True),
        "engine, CPU graph": Ours(options.model, options.context, num_steps, options.threads),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.steps):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender.step()
            times[name].append((time.perf_counter() - started) * 1e3)
    table = Table("", "ms per step", "quartiles", "ready after s", box=None)
    for name, contender in contenders.items():
        low, middle, high = statistics.quantiles(times[name], n=4)
        table.add_row(name, f"{middle:.2f}", f"{low:.2f}..{high:.2f}", f"{contender.ready_seconds:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
