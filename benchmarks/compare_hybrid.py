"""A hybrid of recurrent layers and attention, 0.3 to 0.4 B random weights: latency against transformers' generate.

    python -m benchmarks.compare_hybrid [--kind delta_net] [--ranks 2] [--input-len 512] [--output-len 32] [--repeats 5]

Kinds: gated delta nets (the layers of Qwen3-Next, with dense feed-forward blocks), Mamba 2 (Bamba) or short
convolutions (LFM 2). Both sides get the same checkpoint in bfloat16
and as many threads as there are ranks, and take turns with lone requests, so that other load on the machine meets both.
The table shows the fastest and the median repetition of each, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ulysses_infer
from benchmarks.arguments import common_options
from ulysses_infer.console.library_logging import quiet_libraries

COMMON: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "delta_net": (
        "qwen3_next",
        {
            "head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "mlp_only_layers": list(range(16)),
            "num_experts": 0,
        },
    ),
    "mamba2": (
        "bamba",
        {
            "attn_layer_indices": [3, 7, 11, 15],
            "mamba_n_heads": 32,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
        },
    ),
    "convolution": ("lfm2", {"layer_types": ["conv", "conv", "conv", "full_attention"] * 4}),
}
"""The model type and its sizes, by the kind of the recurrent layers. A quarter of the layers are attention."""


class Latency(NamedTuple):
    """Of one request, in milliseconds."""

    first_token: float
    per_token: float


def write_model(kind: str, folder: Path) -> int:
    """Write the random checkpoint; returns its number of parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model_type, sizes = KINDS[kind]
    config = AutoConfig.for_model(model_type, **COMMON, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def latency_of(generate: Callable[[int], float], output_len: int) -> Latency:
    """generate: seconds of a request with that many output tokens."""
    first = generate(1)
    return Latency(first * 1e3, (generate(output_len) - first) / (output_len - 1) * 1e3)


def prompts(length: int) -> Callable[[], list[int]]:
    """A source of prompts that share nothing."""
    random = torch.Generator().manual_seed(1)
    return lambda: torch.randint(COMMON["vocab_size"], (length,), generator=random).tolist()


def serve_transformers(connection: Connection, folder: str, threads: int, input_len: int) -> None:
    """Measure a request with transformers for each output length received."""
    from transformers import AutoModelForCausalLM

    quiet_libraries(rank=0)
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    prompt = prompts(input_len)
    while output_len := connection.recv():

        def generate(count: int) -> float:
            tokens = torch.tensor([prompt()])
            started = time.perf_counter()
            model.generate(tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            return time.perf_counter() - started

        connection.send(latency_of(generate, output_len))


def measure_ours(engine: ulysses_infer.InferenceEngine, prompt: Callable[[], list[int]], output_len: int) -> Latency:
    """A request with this engine, which streams its tokens."""
    params = ulysses_infer.SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    tokens, started = prompt(), time.perf_counter()
    times = [time.perf_counter() - started for _ in engine.stream(tokens, params)]
    return Latency(times[0] * 1e3, (times[-1] - times[0]) / (output_len - 1) * 1e3)


def _shown(latency: Latency) -> str:
    return f"TTFT {latency.first_token:.0f} ms, TPOT {latency.per_token:.1f} ms"


def show(name: str, theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Print one row; returns it."""
    row = {
        "transformers_min": min(theirs),
        "ours_min": min(ours),
        "ratio_of_min": min(theirs) / min(ours),
        "transformers_median": statistics.median(theirs),
        "ours_median": statistics.median(ours),
        "ratio_of_medians": statistics.median(theirs) / statistics.median(ours),
    }
    print(f"{name:9}" + "".join(f"{value:20.2f}" for value in row.values()), flush=True)
    return row


def main() -> None:
    """Run both sides in turns."""
    defaults = common_options(ranks=2, input_len=512, output_len=32, repeats=5, output=None)
    parser = argparse.ArgumentParser(
        description=__doc__, parents=[defaults], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=KINDS, default="delta_net", help="of recurrent layers (default: %(default)s)")
    options = parser.parse_args()
    quiet_libraries(rank=0)
    with tempfile.TemporaryDirectory() as folder:
        billions = write_model(options.kind, Path(folder)) / 1e9
        print(f"{options.kind}: {billions:.2f} B parameters; other load: {os.getloadavg()[0]:.1f} processes")
        context = multiprocessing.get_context("spawn")
        mine, other = context.Pipe()
        arguments = (other, folder, options.ranks, options.input_len)
        process = context.Process(target=serve_transformers, args=arguments, daemon=True)
        process.start()
        settings = {"parallel.sp": options.ranks, "cache.memory_bytes": 1 << 30}
        prompt = prompts(options.input_len)
        theirs: list[Latency] = []
        ours: list[Latency] = []
        with ulysses_infer.init_inference(folder, settings) as engine:
            for number in range(options.repeats + 1):  # the first is a warm-up
                mine.send(options.output_len)
                theirs.append(mine.recv())
                ours.append(measure_ours(engine, prompt, options.output_len))
                print(f"{number}: transformers {_shown(theirs[-1])}; ours {_shown(ours[-1])}", flush=True)
        mine.send(0)
        process.join()
    header = ("transformers min", "ours min", "ratio", "transformers median", "ours median", "ratio")
    print(f"{'':9}" + "".join(f"{name:>20}" for name in header))
    rows = {
        name: show(name, [getattr(each, field) for each in theirs[1:]], [getattr(each, field) for each in ours[1:]])
        for name, field in (("TTFT ms", "first_token"), ("TPOT ms", "per_token"))
    }
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
