"""Perplexity of a model before and after `model.quantize`, on text that every machine has.

    python -m tools.measure_perplexity models/demo [--tokens 4096] [--window 256] [--dtype bfloat16] [--groups 64 128]

The text is the language reference that Python installs (`pydoc_data.topics`), in windows of which every token but the
first is predicted. The engine computes the log-probabilities, with the kernels that serve.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pydoc_data.topics import topics
from typing import Any

import ulysses_infer
from ulysses_infer.config.schema import DTYPES
from ulysses_infer.config.validation import GROUP_SIZES

MOST_CHARACTERS = 8
"""Per token, of the text that is encoded."""
Variant = tuple[str, dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each way of storing the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint: folder, hub id or GGUF file")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of text")
    parser.add_argument("--window", type=int, default=256, help="tokens that are predicted from one another")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--groups", type=int, nargs="*", choices=GROUP_SIZES, default=GROUP_SIZES, help="of int4")
    given = parser.parse_args(arguments)
    plain = None
    for name, settings in variants(given.groups):
        found = perplexity(given.model, {"dtype": given.dtype, **settings}, given.tokens, given.window)
        plain = plain or found
        print(f"{name:>18} {found:10.4f} {100 * (found / plain - 1):+8.2f} %", flush=True)


def variants(groups: Sequence[int]) -> Iterator[Variant]:
    """Ways of storing the weights, the checkpoint's own first."""
    yield "as it is", {}
    yield "int8", {"quantize": "int8"}
    for size in groups:
        yield f"int4, groups of {size}", {"quantize": "int4", "quantize_group_size": size}


def perplexity(path: str, settings: dict[str, Any], num_tokens: int, window: int) -> float:
    """The exponential of the mean negative log-probability per token."""
    params = ulysses_infer.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    with ulysses_infer.init_inference(path, {"model": {"path": path, **settings}}) as engine:
        text = "\n".join(topics[name] for name in sorted(topics))[: num_tokens * MOST_CHARACTERS]
        ids = engine.tokenizer.encode(text)[: num_tokens + 1]
        edges = [*range(0, len(ids) - window, window), len(ids)]
        outputs = engine.generate([ids[start:end] for start, end in pairwise(edges)], params)
    values = [
        chosen[token].logprob
        for output in outputs
        for token, chosen in zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
        if chosen is not None
    ]
    return math.exp(-sum(values) / len(values))


if __name__ == "__main__":
    main()
