"""Structured outputs on two ranks: the mode of a step changes nothing."""

import re

import pytest

from tests.tiny import settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference

pytestmark = pytest.mark.distributed
PROMPTS = ["hello", "a", "the quick brown fox"]
WANTED = [
    {"regex": "[a-z]{4}-[0-9]{2}"},
    {
        "json": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "disable_any_whitespace": True,
    },
    {"choice": ["yes", "no", "maybe"]},
]
PATTERNS = ["[a-z]{4}-[0-9]{2}", r"\[(true|false)(,(true|false)){0,2}\]", "yes|no|maybe"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("llama")
    tiny_llama(made)
    return str(made)


def generate(folder, sp, tp, mode, temperature):
    params = [
        SamplingParams(structured_outputs=wanted, temperature=temperature, seed=seed, max_tokens=30)
        for seed, wanted in enumerate(WANTED)
    ]
    with init_inference(folder, **settings(sp, tp)) as engine:
        if mode == "flip" and engine.is_first:
            available, steps = engine.config.parallel.available_modes, iter(range(10**6))
            engine._engine.choose_mode = lambda _: available[next(steps) % len(available)]
        elif mode != "flip":
            engine.set_policy("static", mode=mode)
        outputs = engine.generate(PROMPTS, params)
        return [(output.outputs[0].text, output.outputs[0].finish_reason) for output in outputs]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_mode_gives_the_same_matching_outputs(folder, rank_pool, temperature):
    (first,) = rank_pool(1).run(generate, folder, 1, 1, "sp", temperature)
    assert all(re.fullmatch(pattern, text) for pattern, (text, _) in zip(PATTERNS, first, strict=True))
    assert {reason for _, reason in first} == {"stop"}
    for sp, tp, mode in ((2, 1, "sp"), (2, 1, "tp"), (2, 1, "flip"), (1, 2, "tp")):
        results = rank_pool(2).run(generate, folder, sp, tp, mode, temperature)
        assert results == [first, first], (sp, tp, mode)
