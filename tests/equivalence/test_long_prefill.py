"""Long prompts in chunks: the answer is correct, and memory beside the cache follows the chunk, not the prompt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure_long_prefill import BLOCK_SIZE, SHAPE, PeakMemory, memory_of, prompt, settings
from tests.equivalence.cases import TOLERANCE, ModeShuffle
from tests.equivalence.tiny_models import make_checkpoint

pytestmark = pytest.mark.distributed
LONGEST = 130_000
SLACK = 16 << 20  # of the allocator and the prompt's own ids; a copy of one layer's keys and values would be 33 MB


class Prefill(NamedTuple):
    """The result of one prompt on a rank."""

    logprobs: dict[int, float]  # of the likeliest tokens to follow; the same on every rank
    beside_cache: int  # bytes at the peak beyond those before the first prompt and beyond what the cache accounts for
    modes: set[str]


def prefill(folder: Path, lengths: list[int], chunk: int, fixed: tuple[int, int] | None = None) -> list[Prefill]:
    """On every rank: prompts of these lengths, each longer than the one before, in changing modes or a fixed one."""
    from ulysses_infer import SamplingParams, init_inference

    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=5)
    results = []
    with init_inference(str(folder), **settings(LONGEST, chunk, 2)) as engine:
        modes = ModeShuffle([mode for mode in engine.config.parallel.available_modes if fixed in (None, tuple(mode))])
        if engine._engine is not None:  # rank 0 alone chooses modes
            engine._engine.choose_mode = modes
        engine.generate([prompt(2 * chunk)], one)
        worker, before = engine._running_rank().worker, memory_of(os.getpid())
        token_bytes = worker.cache.shape.bytes_per_block / BLOCK_SIZE
        if getattr(worker.backend, "longest_query", 0) < chunk:  # it gathers the keys and values of a layer
            token_bytes *= 1 + 1 / worker.model.shape.num_layers
        for length in lengths:
            with PeakMemory([os.getpid()]) as seen:
                (output,) = engine.generate([prompt(length)], one)
            (likeliest,) = output.outputs[0].logprobs or []
            found = {token: entry.logprob for token, entry in likeliest.items()}
            taken = seen.bytes[os.getpid()] - before
            results.append(Prefill(found, int(taken - length * token_bytes), set(modes.used)))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that is made for 32,768 positions; the recipe stretches it to 131,072 with YaRN."""
    made = tmp_path_factory.mktemp("long")
    make_checkpoint(LlamaConfig(**SHAPE), made)
    return made


@torch.inference_mode()
def reference(folder: Path, length: int) -> torch.Tensor:
    """transformers' log-probabilities of the token after the prompt, by one forward of a config that has YaRN."""
    rope = settings(LONGEST, 1, 1)["model.hf_overrides"]["rope_parameters"]
    config = LlamaConfig(**SHAPE, rope_parameters={**rope, "rope_theta": 10000.0})
    model = LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    logits = model(torch.tensor([prompt(length)]), use_cache=False, logits_to_keep=1).logits[0, -1]
    return logits.log_softmax(dim=-1)


def test_a_long_prompt_in_chunks_equals_transformers_and_takes_the_memory_of_a_chunk(
    folder: Path, rank_pool: Any
) -> None:
    ranks = rank_pool(2).run(prefill, folder, [2048, 8192], 512)
    expected = reference(folder, 8192)
    for shorter, longer in ranks:
        assert longer.logprobs == pytest.approx({t: float(expected[t]) for t in longer.logprobs}, abs=TOLERANCE)
        assert max(shorter.beside_cache, longer.beside_cache) < SLACK
    assert int(expected.argmax()) in ranks[0][1].logprobs
    assert len(ranks[0][1].modes) == 2


@pytest.mark.thorough
@pytest.mark.timeout(3000)
def test_a_prompt_of_130_thousand_tokens_does_not_depend_on_chunks_and_modes(folder: Path, rank_pool: Any) -> None:
    changing = rank_pool(2).run(prefill, folder, [16384, LONGEST], 2048, timeout=1400)
    alone = rank_pool(2).run(prefill, folder, [LONGEST], 8192, (1, 2), timeout=1400)
    for (short, long), (other,) in zip(changing, alone, strict=True):
        assert long.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
        assert max(short.beside_cache, long.beside_cache, other.beside_cache) < SLACK
