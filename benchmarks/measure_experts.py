"""Mixtures of experts on a CPU: decode steps, recorded and eager, and the products of all experts of a layer.

    python -m benchmarks.measure_experts [--repeats 5] [--threads 1] [--output FILE]

A random model like Qwen3-MoE: 4 layers, hidden size 1024, 32 experts of width 768, 8 per token, bfloat16. The first
table has the CPU time of a decode step, the bytes of weights that it reads (experts that no token chose are not read),
and the share of the speed at which one long read of memory runs in the same program. The second has the products of all
experts with one matrix each: one native call, and a call per expert, which is what many rows had before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import common_options
from benchmarks.cpu_times import least_cpu_seconds
from benchmarks.processor import READ_BYTES, MemoryReader, processor
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.console.library_logging import quiet_libraries
from ulysses_infer.native.matmul import NativeMatmul

LAYERS, HIDDEN, EXPERTS, WIDTH, CHOICES, VOCABULARY = 4, 1024, 32, 768, 8, 4096
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 3072,
    "moe_intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOICES,
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DENSE = LAYERS * (HIDDEN * 64 * (16 + 2 * 4 + 16) + HIDDEN * EXPERTS) + VOCABULARY * HIDDEN
"""Weights that every step reads."""
SEQUENCES = (1, 4, 16)
STEPS = 32
ROWS = (1, 4, 16, 64, 256)
"""Of each expert."""


def least(call: Callable[[], object], repeats: int) -> float:
    """The least CPU time of a call, in seconds per thread."""
    return least_cpu_seconds(call, repeats) / torch.get_num_threads()


def make_model(folder: Path) -> None:
    """Write the random model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **CONFIG)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def step_seconds(folder: Path, sequences: int, eager: bool, repeats: int) -> tuple[float, float]:
    """Seconds of a decode step, and the mean number of experts of a layer that its tokens chose."""
    settings = {
        "runtime.enforce_eager": eager or None,
        "scheduler.max_num_seqs": sequences,
        "scheduler.max_num_batched_tokens": 256,
        "cache.num_blocks": 32 * sequences + 32,
        "policy.name": "static",
        "model.max_model_len": 128,
    }
    prompts = [[index + 1, 2, 3] for index in range(sequences)]
    long, short = (SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True) for tokens in (STEPS + 2, 2))
    with init_inference(str(folder), **settings) as engine:
        for _ in range(2):
            engine.generate(prompts, long)
        seconds = [least(partial(engine.generate, prompts, params), repeats) for params in (long, short)]
        rank: Any = engine._rank
        return (seconds[0] - seconds[1]) / STEPS, chosen_experts(rank.worker, sequences)


def chosen_experts(worker: Any, tokens: int) -> float:
    """How many experts of a layer `tokens` tokens choose, if each expert is as popular as so far."""
    totals = []
    for layer in worker.model.injection.expert_layers:
        counts = torch.tensor(layer.token_counts(), dtype=torch.float64)
        share = counts / counts.sum() * CHOICES  # of tokens that chose each
        totals.append(float((1 - (1 - share.clamp(max=1)) ** tokens).sum()))
    return sum(totals) / len(totals)


def decode_table(repeats: int, speed: float) -> Iterator[dict[str, Any]]:
    """Decode steps of each number of sequences."""
    print(f"{'sequences':>10}{'eager ms':>11}{'recorded ms':>13}{'ratio':>8}{'MB read':>9}{'of memory speed':>17}")
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name))
        for sequences in SEQUENCES:
            eager, _ = step_seconds(Path(name), sequences, True, repeats)
            recorded, chosen = step_seconds(Path(name), sequences, False, repeats)
            size = 2 * (DENSE + LAYERS * chosen * 3 * HIDDEN * WIDTH)
            share = size / recorded / speed
            print(
                f"{sequences:10}{eager * 1e3:11.2f}{recorded * 1e3:13.2f}{eager / recorded:8.2f}{size / 1e6:9.0f}"
                f"{share:17.2f}",
                flush=True,
            )
            yield {"sequences": sequences, "eager": eager, "recorded": recorded, "bytes": size, "share": share}


def product_table(repeats: int) -> Iterator[dict[str, Any]]:
    """The up product of all experts: one call, and one for each."""
    print(f"{'rows each':>10}{'per expert ms':>15}{'one call ms':>13}{'ratio':>8}")
    native = NativeMatmul()
    matrices = [torch.randn(EXPERTS, 2 * WIDTH, HIDDEN).bfloat16() for _ in range(4)]  # more than the caches hold
    for rows in ROWS:
        tokens = torch.randn(EXPERTS * rows, HIDDEN).bfloat16()
        ends = torch.arange(rows, EXPERTS * rows + 1, rows, dtype=torch.int32)
        visited = itertools.cycle(matrices)

        def loop(tokens: torch.Tensor = tokens, visited: Any = visited, rows: int = rows) -> torch.Tensor:
            pieces = zip(tokens.split(rows), next(visited), strict=True)
            return torch.cat([native(part, matrix) for part, matrix in pieces])

        def once(tokens: torch.Tensor = tokens, visited: Any = visited, ends: torch.Tensor = ends) -> object:
            return native.experts.multiply(tokens, next(visited), None, ends, native.choices[torch.bfloat16])

        each, one = least(loop, 4 * repeats), least(once, 4 * repeats)
        print(f"{rows:10}{each * 1e3:15.2f}{one * 1e3:13.2f}{each / one:8.2f}", flush=True)
        yield {"rows": rows, "per_expert": each, "one_call": one}


def main() -> None:
    """Measure and print both tables."""
    options = argparse.ArgumentParser(
        description=__doc__,
        parents=[common_options(repeats=5, threads=1, output=None)],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    quiet_libraries(rank=0)
    torch.set_num_threads(options.threads)
    speed = READ_BYTES / MemoryReader().seconds(options.repeats)
    print(f"{processor()}, {options.threads} threads; memory {speed / 1e9:.1f} GB/s a thread")
    decodes = list(decode_table(options.repeats, speed))
    products = list(product_table(options.repeats))
    if options.output:
        options.output.write_text(json.dumps({"read": speed, "decodes": decodes, "products": products}, indent=1))


if __name__ == "__main__":
    main()
