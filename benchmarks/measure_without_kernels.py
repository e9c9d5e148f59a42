"""What a CPU without compiled kernels loses: decode steps and prompts with `native/` and with torch alone.

    python -m benchmarks.measure_without_kernels [--level native x86-64-v3] [--repeats 5] [--output FILE]

One rank with one thread runs the demo model and a random Llama of 60 M parameters in bfloat16, as a start without a
compiler would (ULYSSES_INFER_NATIVE=0) and with kernels, in processes of their own. Times are the least CPU times of a
step. The warning of a start without a compiler (`native/matmul.py`) cites the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import common_options
from benchmarks.compare_peers.programs import LEVELS
from benchmarks.cpu_times import least_cpu_seconds
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.atomic_files import write_atomically
from ulysses_infer.bench.random_model import random_model
from ulysses_infer.child_processes import end_children_with_this_process
from ulysses_infer.engine.profile_key import device_name
from ulysses_infer.native.library import SWITCH

DEMO, RANDOM = "models/demo", "llama-60m"
PROMPTS = (16, 128, 512)
STEPS = 32
WORKER = "--worker"
Times = dict[str, float]
"""Seconds by case: `decode`, or the tokens of a prompt."""


def step_times(path: str, repeats: int) -> Times:
    """Of a decode step of one request, and of a prompt of each length; the first token of a prompt is part of it."""
    settings = {
        "model.dtype": "bfloat16",
        "model.max_model_len": PROMPTS[-1] + STEPS + 16,
        "cache.num_blocks": 128,
        "cache.enable_prefix_caching": False,
        "policy.name": "static",
        "runtime.device": "cpu",
        "runtime.threads_per_rank": 1,
    }
    long, short = (SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (STEPS + 1, 1))
    with init_inference(path, **settings) as engine:
        prompts = {count: [[1 + number % 90 for number in range(count)]] for count in PROMPTS}
        for params, ids in itertools.product((long, short), prompts.values()):
            engine.generate(ids, params)  # records decodes, and measures kernels where that was never done
        found = {
            str(count): least_cpu_seconds(partial(engine.generate, ids, short), repeats)
            for count, ids in prompts.items()
        }
        first = prompts[PROMPTS[0]]
        decodes = least_cpu_seconds(partial(engine.generate, first, long), repeats)
    return {"decode": (decodes - found[str(PROMPTS[0])]) / STEPS, **found}


def in_a_process(path: str, level: str, has_kernels: bool, repeats: int) -> Times:
    """`step_times` in a process of its own: whether there are kernels is decided once per process."""
    variables = {**os.environ, **LEVELS[level], SWITCH: str(int(has_kernels)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.measure_without_kernels", WORKER, path, "--repeats", str(repeats)]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    times: Times = json.loads(done.stdout.splitlines()[-1])
    return times


def compare(path: str, level: str, repeats: int) -> dict[str, tuple[float, float]]:
    """(seconds with kernels, seconds without) by case."""
    own, torch_alone = (in_a_process(path, level, has_kernels, repeats) for has_kernels in (True, False))
    return {case: (own[case], torch_alone[case]) for case in own}


def table(level: str, model: str, found: dict[str, tuple[float, float]]) -> str:
    """A line per case."""
    lines = [f"{model}, {level}", f"{'':>18}{'kernels ms':>12}{'torch ms':>10}{'ratio':>7}"]
    for case, (own, torch_alone) in found.items():
        name = "decode, 1 row" if case == "decode" else f"prompt, {case}"
        lines.append(f"{name:>18}{own * 1e3:12.2f}{torch_alone * 1e3:10.2f}{torch_alone / own:7.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    end_children_with_this_process()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common_options(repeats=5, output=None)],
    )
    parser.add_argument("--level", nargs="+", choices=LEVELS, default=[*LEVELS], help="instructions to use")
    parser.add_argument(WORKER, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        print(json.dumps(step_times(given.worker, given.repeats)))
        return
    processor = device_name(torch.device("cpu"))
    print(processor)
    results: dict[str, Any] = {"processor": processor}
    for level, (model, path) in itertools.product(given.level, {"demo": DEMO, RANDOM: random_model(RANDOM)}.items()):
        found = compare(str(path), level, given.repeats)
        print(table(level, model, found), flush=True)
        results.setdefault(level, {})[model] = found
        if given.output is not None:
            write_atomically(Path(given.output), json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
