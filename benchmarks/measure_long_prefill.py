"""Peak memory of a rank during the chunked prefill of a long prompt: outside the cache it depends only on the chunk.

    python -m benchmarks.measure_long_prefill [--lengths 16384 130000] [--chunk 2048] [--sp 2]

Runs a Llama with two narrow layers, random weights and 32,768 positions, extended with YaRN, in processes on this host
(Linux, CPU), with a different mode in each step. The first prompt is a warm-up. The table shows the peak memory of the
rank that uses most, beyond its memory after the warm-up, and the part of the cache in it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import ulysses_infer
from benchmarks.arguments import common_options
from ulysses_infer.console.library_logging import quiet_libraries
from ulysses_infer.errors import UlyssesError

MIB = 1 << 20
ORIGINAL = 32768  # positions of the model without YaRN
BLOCK_SIZE = 16
INTERVAL = 0.005  # seconds between samples
OWN_MEMORY = ("RssAnon", "RssShmem", "VmSwap")
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": ORIGINAL,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Narrow, so that 130,000 tokens take only minutes; a token takes 1 KiB of cache over all ranks."""


class Row(NamedTuple):
    """The measurements of one prompt."""

    tokens: int
    steps: int
    seconds: float
    peak_bytes: int
    """Additional memory of the rank that uses most."""
    cache_bytes: int
    """The part of its cache blocks."""


class PeakMemory:
    """Peak memory of processes, sampled from a thread: `with PeakMemory([pid]) as seen:`.

    Counts their own memory, in RAM or swapped out, but not mapped files, which the system may evict.
    """

    def __init__(self, pids: list[int]) -> None:
        self.bytes = {pid: memory_of(pid) for pid in pids}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            ended = self._ended.wait(INTERVAL)
            self.bytes = {pid: max(most, memory_of(pid)) for pid, most in self.bytes.items()}
            if ended:
                return


def memory_of(pid: int) -> int:
    """Current memory of the process in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.partition(":")[0] in OWN_MEMORY)


def make_model(folder: str) -> None:
    """Save the model with random weights in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)


def settings(longest: int, chunk: int, sp: int) -> dict[str, Any]:
    """Keyword arguments of `init_inference` for prompts of up to `longest` tokens in steps of `chunk`."""
    stretch = {
        "rope_type": "yarn",
        "factor": float(max(1, math.ceil((longest + 1) / ORIGINAL))),
        "original_max_position_embeddings": ORIGINAL,
    }
    return {
        "model.hf_overrides": {"rope_parameters": stretch},
        "model.max_model_len": longest + 1,
        "parallel.sp": sp,
        "parallel.modes": [[part, sp // part] for part in range(1, sp + 1) if sp % part == 0],
        "cache.num_blocks": -(-longest // BLOCK_SIZE) + 1,
        "cache.block_size": BLOCK_SIZE,
        "cache.enable_prefix_caching": False,  # a longer prompt would reuse the shorter one
        "scheduler.max_num_batched_tokens": chunk,
        "runtime.device": "cpu",
        "runtime.threads_per_rank": 1,
    }


def prompt(length: int) -> list[int]:
    """`length` random token ids, the same in every run."""
    return random.Random(0).choices(range(3, 256), k=length)


def measure(engine: Any, lengths: list[int], chunk: int) -> list[Row]:
    """Compute a prompt of each length, the shortest first, and measure all processes of the engine."""
    modes = itertools.cycle(engine.config.parallel.available_modes)
    engine._engine.choose_mode = lambda _: next(modes)
    block_bytes = engine.stats()["cache_bytes_per_rank"] // engine.stats()["num_blocks"]
    one = ulysses_infer.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engine.generate([prompt(2 * chunk)], one)
    pids = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    touched = -(-2 * chunk // BLOCK_SIZE)
    before = {pid: memory_of(pid) for pid in pids}
    rows = []
    for length in sorted(lengths):
        started = time.perf_counter()
        with PeakMemory(pids) as seen:
            engine.generate([prompt(length)], one)
        taken = max(seen.bytes[pid] - before[pid] for pid in pids)
        cache = max(0, -(-length // BLOCK_SIZE) - touched) * block_bytes
        rows.append(Row(length, -(-length // chunk), time.perf_counter() - started, taken, cache))
    return rows


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common_options(attention_backend="auto")],
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 130000], help="tokens of each prompt")
    parser.add_argument("--chunk", type=int, default=2048, help="scheduler.max_num_batched_tokens")
    parser.add_argument("--sp", type=int, default=2, choices=(1, 2), help="ranks")
    arguments = parser.parse_args()
    quiet_libraries(rank=0)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        changes = settings(max(arguments.lengths), arguments.chunk, arguments.sp)
        changes["runtime.attention_backend"] = arguments.attention_backend
        try:
            with ulysses_infer.init_inference(folder, **changes) as engine:
                rows = measure(engine, arguments.lengths, arguments.chunk)
        except UlyssesError as error:
            sys.exit(f"error: {error}")
    print("| prompt | steps | seconds | peak per rank | cache | other |\n|---|---|---|---|---|---|")
    for row in rows:
        sizes = (row.peak_bytes, row.cache_bytes, row.peak_bytes - row.cache_bytes)
        shown = " | ".join(f"{size / MIB:.1f} MiB" for size in sizes)
        print(f"| {row.tokens} | {row.steps} | {row.seconds:.0f} | {shown} |")


if __name__ == "__main__":
    main()
