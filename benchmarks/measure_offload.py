"""A prompt whose blocks were evicted: computed again, or loaded from host memory or disk.

    python -m benchmarks.measure_offload [--input-len 1024] [--repeats 5] [--threads 1] [--output FILE]

A random dense model on a CPU: 4 layers, hidden size 1024, bfloat16. The cache holds one and a half prompts, so that
each of three prompts in turn finds its blocks evicted. The table has the least CPU time of the first token: with the
tier below the cache off, with blocks in host memory, and with blocks on disk (in the page cache of the system, if there
is room); then that of a prompt whose blocks are still on the device.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import common_options
from benchmarks.processor import processor
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.console.library_logging import quiet_libraries
from ulysses_infer.inference import InferenceEngine

BLOCK, VOCABULARY = 16, 4096
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FIRST_TOKEN = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)


def save_model(folder: Path, longest: int) -> None:
    """Save the random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**CONFIG, max_position_embeddings=longest)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def cpu_seconds(engine: InferenceEngine, prompts: Sequence[Sequence[int]], repeats: int) -> float:
    """The least CPU time of one prompt's first token, over prompts in turn, after a round that fills the caches."""
    times = []
    for turn in range((repeats + 1) * len(prompts)):
        started = time.process_time()
        engine.generate([list(prompts[turn % len(prompts)])], FIRST_TOKEN)
        times.append(time.process_time() - started)
    return min(times[len(prompts) :])


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """CPU seconds of each case, and the tokens that the tier had in all rounds."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(VOCABULARY, (3, options.input_len), generator=generator).tolist()
    blocks = ceil_div(options.input_len + 1, BLOCK)
    enough, block = 4 * blocks, BLOCK * 4 * 2 * 4 * 64 * 2  # tokens, layers, keys and values, heads, width, bytes
    disk = {"offload_disk_bytes": enough * block, "offload_disk_folder": str(folder)}
    cases: dict[str, tuple[dict[str, Any], Sequence[Sequence[int]]]] = {
        "computed again": ({}, prompts),
        "host memory": ({"offload_host_bytes": enough * block}, prompts),
        "disk": ({"offload_host_bytes": 4 * block, **disk}, prompts),
        "on the device": ({}, prompts[:1]),
    }
    found = []
    for name, (tier, asked) in cases.items():
        cache = {"block_size": BLOCK, "num_blocks": blocks + blocks // 2, **tier}
        settings = {"cache": cache, "runtime": {"device": "cpu", "threads_per_rank": options.threads}}
        with init_inference(str(folder), settings) as engine:
            seconds = cpu_seconds(engine, asked, options.repeats)
            found.append({"blocks": name, "seconds": seconds, **engine.stats()})
    return found


def main() -> None:
    """Measure all cases."""
    options = argparse.ArgumentParser(
        description=__doc__,
        parents=[common_options(input_len=1024, repeats=5, threads=1, output=None)],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    quiet_libraries(rank=0)
    print(f"{processor()}, {options.threads} threads, prompts of {options.input_len} tokens")
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), options.input_len + 1)
        rows = measure(Path(folder), options)
    print(f"{'blocks':16}{'CPU ms':>10}{'tokens from the tier':>22}")
    for row in rows:
        hits = row.get("external_prefix_cache_hits", 0)
        print(f"{row['blocks']:16}{row['seconds'] * 1e3:10.1f}{hits:22}")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
