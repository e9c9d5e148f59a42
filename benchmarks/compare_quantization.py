"""Weights of 8 and 4 bits, made while loading, against bfloat16 on a CPU.

    python -m benchmarks.compare_quantization [--random-model llama-0.5b] [--repeats 11] [--output FILE]

One process with all threads holds an engine of each kind. They take turns in every round, in random order, with one
prompt of each length (one token out) and a lone decode; the memory is read five times per round. The first two rounds
record steps and do not count. Printed are medians, the medians of each round's ratio to bfloat16, and a token's time as
a multiple of what reading the weights takes at the memory's speed of that round.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Mapping
from statistics import median

import torch

from benchmarks.arguments import common_options, model_options, model_path
from benchmarks.processor import READ_BYTES, MemoryReader, processor, seconds_to
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.console.library_logging import quiet_libraries
from ulysses_infer.inference import InferenceEngine

KINDS = {"bfloat16": None, "int8": "int8", "int4": "int4"}
"""What the engines are called, and their `model.quantize`."""
LENGTHS = (64, 128, 512)
OUTPUT_LEN, DECODE_PROMPT = 24, 32
WARM_UP = 2  # rounds
TOKEN = "token"
Rounds = Mapping[tuple[str, str | int], list[float]]
"""Seconds of every round, by kind of engine and measured work: the length of a prompt, or TOKEN."""


def seconds_of(engine: InferenceEngine, length: int, tokens: int) -> float:
    """Seconds to generate `tokens` tokens for a random prompt."""
    prompt = [random.randrange(engine.vocab_size) for _ in range(length)]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return seconds_to(lambda: engine.generate([prompt], params))


def token_seconds(engine: InferenceEngine) -> float:
    """Seconds per token of a lone decode."""
    prompt = seconds_of(engine, DECODE_PROMPT, 1)
    return (seconds_of(engine, DECODE_PROMPT, 1 + OUTPUT_LEN) - prompt) / OUTPUT_LEN


def bytes_read(engine: InferenceEngine) -> int:
    """Bytes of the weights that a decode step reads: all but the embeddings, unless the head shares them."""
    assert engine._rank is not None
    injection = engine._rank.worker.model.injection
    embeddings, head = injection.model.get_input_embeddings().weight, injection.head
    is_read = head.stored is None and head.rows().data_ptr() == embeddings.data_ptr()
    return sum(each.nbytes for each in injection.model.parameters()) - (0 if is_read else embeddings.nbytes)


def measure(engines: Mapping[str, InferenceEngine], repeats: int) -> tuple[Rounds, list[float]]:
    """Seconds of each kind of work in each round, and of reading READ_BYTES of memory, without the first rounds."""
    reads: list[float] = []
    found: defaultdict[tuple[str, str | int], list[float]] = defaultdict(list)
    memory, names = MemoryReader(), list(engines)
    for _ in range(WARM_UP + repeats):
        random.shuffle(names)
        for length in LENGTHS:
            for name in names:
                found[name, length].append(seconds_of(engines[name], length, 1))
        reads.append(median(memory.seconds() for _ in range(5)))
        for name in names:
            found[name, TOKEN].append(token_seconds(engines[name]))
    return {key: seconds[WARM_UP:] for key, seconds in found.items()}, reads[WARM_UP:]


def row(rounds: Rounds, reads: list[float], name: str, size: int) -> dict[str, float]:
    """The figures of one kind of engine, whose decode step reads `size` bytes of weights."""
    figures: dict[str, float] = {"bytes": size}
    for work in (*LENGTHS, TOKEN):
        own, dense = rounds[name, work], rounds["bfloat16", work]
        figures[f"{work} ms"] = median(own) * 1e3
        figures[f"{work} ratio"] = median(a / b for a, b in zip(dense, own, strict=True))
    share = size / READ_BYTES
    figures["of reading"] = median(a / (b * share) for a, b in zip(rounds[name, TOKEN], reads, strict=True))
    return figures


def show(rows: Mapping[str, Mapping[str, float]], speed: float) -> None:
    """Print the table."""
    print(f"{processor()}, {torch.get_num_threads()} threads; memory is read at {speed / 1e9:.1f} GB/s")
    heads = [
        f"{work} ms".rjust(15) + "faster".rjust(9) for work in (*(f"{length} tokens" for length in LENGTHS), "TPOT")
    ]
    print(f"{'':10}{'MB':>6}{''.join(heads)}{'of reading':>12}")
    for name, figures in rows.items():
        cells = "".join(f"{figures[f'{work} ms']:15.1f}{figures[f'{work} ratio']:8.2f}x" for work in (*LENGTHS, TOKEN))
        print(f"{name:10}{figures['bytes'] / 1e6:6.0f}{cells}{figures['of reading']:11.2f}x")


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(
        description=__doc__,
        parents=[model_options("llama-60m"), common_options(repeats=11, output=None)],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    quiet_libraries(rank=0)
    longest = max(LENGTHS) + OUTPUT_LEN + 1
    settings = {"model.max_model_len": longest, "cache.num_blocks": 64, "cache.enable_prefix_caching": False}
    path = model_path(options)
    engines = {
        name: init_inference(path, **settings, **({"model.quantize": kind} if kind else {}))
        for name, kind in KINDS.items()
    }
    rounds, reads = measure(engines, options.repeats)
    rows = {name: row(rounds, reads, name, bytes_read(engine)) for name, engine in engines.items()}
    show(rows, READ_BYTES / median(reads))
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
