"""Vectors of prompts, compared with transformers' hidden states."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModel

from tests.tiny import settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import RequestError
from ulysses_infer.sampling_params import POOLINGS

PROMPTS = [[5, 9, 11, 7, 8, 6, 20, 21, 22, 23, 24, 3], [7], [8, 9], list(range(4, 30))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("pooled")
    tiny_llama(made)
    return str(made)


@pytest.fixture(scope="module")
def expected(folder):
    """By pooling: [the vector of each prompt]."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = [model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]
    return {"last": [s[-1] for s in states], "mean": [s.mean(0) for s in states], "cls": [s[0] for s in states]}


def pool(folder, sp, tp, changes):
    """On a rank: the vectors, computed in one batch with requests that generate, with a random mode in each step."""
    chosen = random.Random(5)
    with init_inference(folder, **settings(sp, tp, **changes)) as engine:
        if engine.is_first:
            engine._engine.choose_mode = lambda _: chosen.choice(engine.config.parallel.available_modes)
        greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        alone = engine.generate(PROMPTS, greedy)
        work = [(prompt, SamplingParams(max_tokens=1, pooling=kind)) for kind in POOLINGS for prompt in PROMPTS]
        work += [(prompt, greedy) for prompt in PROMPTS]
        outputs = engine.generate([prompt for prompt, _ in work], [params for _, params in work])
        assert [o.outputs[0].token_ids for o in outputs[-len(PROMPTS) :]] == [o.outputs[0].token_ids for o in alone]
        assert all(output.pooled is None for output in outputs[-len(PROMPTS) :])
        hits = engine.stats()["prefix_cache_hits"]
        return [output.pooled for output in outputs[: -len(PROMPTS)]], hits


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("sp", "tp", "num_tokens"),
    [
        (1, 1, 256),
        (2, 1, 7),
        pytest.param(1, 2, 7, marks=pytest.mark.thorough),
        pytest.param(2, 2, 5, marks=pytest.mark.thorough),
    ],
)
def test_vectors_are_those_of_the_models_hidden_states(folder, expected, rank_pool, sp, tp, num_tokens):
    changes = {"scheduler.max_num_batched_tokens": num_tokens, "scheduler.max_num_seqs": 5}
    for found, hits in rank_pool(sp * tp).run(pool, folder, sp, tp, changes):
        for kind, start in zip(POOLINGS, range(0, len(found), len(PROMPTS)), strict=True):
            for vector, reference in zip(found[start:], expected[kind], strict=False):
                assert torch.allclose(torch.tensor(vector), reference, atol=1e-4), kind
        assert hits > 0


def test_preempted_prompts_have_the_same_vectors(folder, expected):
    changes = {"cache.num_blocks": 12, "scheduler.max_num_batched_tokens": 8, "cache.enable_prefix_caching": False}
    with init_inference(folder, **settings(**changes)) as engine:
        params = [SamplingParams(max_tokens=1, pooling="mean")] * 4 + [SamplingParams(max_tokens=9, temperature=0)] * 4
        outputs = engine.generate(PROMPTS * 2, params, arrival_steps=[3, 4, 5, 2, 0, 0, 0, 0])
        for output, reference in zip(outputs, expected["mean"], strict=False):
            assert torch.allclose(torch.tensor(output.pooled), reference, atol=1e-4)


def test_embed_gives_vectors_of_length_one(folder, expected):
    with init_inference(folder, **settings()) as engine:
        found = torch.tensor(engine.embed(PROMPTS, pooling="mean"))
        assert torch.allclose(found, torch.nn.functional.normalize(torch.stack(expected["mean"]), dim=-1), atol=1e-4)
        plain = torch.tensor(engine.embed(PROMPTS[0], pooling="cls", normalize=False))
        assert torch.allclose(plain[0], expected["cls"][0], atol=1e-4)


def test_wrong_poolings_are_refused():
    with pytest.raises(RequestError, match="pooling is 'max'; use last, mean, cls"):
        SamplingParams(pooling="max")
    with pytest.raises(RequestError, match="n is 2 with pooling='last'; a prompt has one vector"):
        SamplingParams(pooling="last", n=2)
