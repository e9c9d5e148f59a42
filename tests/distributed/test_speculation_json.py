"""JSON under a schema with long keys, with speculation: all documents are valid, and those without it."""

import pytest

from benchmarks.json_output import KEYS, SCHEMA, is_valid
from tests.tiny import settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference

pytestmark = pytest.mark.distributed
PROMPTS = ["hello", "{", '{"has_the_order_been_shipped_to_the_customer":true,']


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """With too few blocks for all requests, so that some are preempted."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(folder, max_position_embeddings=512)
    changes = {"cache.num_blocks": 400, "scheduler.max_num_batched_tokens": 96, "speculation.method": "ngram"}
    with init_inference(str(folder), **settings(**changes, **{"speculation.num_tokens": 7})) as started:
        yield started


def write(engine, numbers, **changes):
    """Outputs, each with its own seed and temperature."""
    params = [
        SamplingParams(
            temperature=(0.0, 0.7, 1.5)[number % 3],
            seed=number,
            max_tokens=440,
            structured_outputs={"json": SCHEMA, "disable_any_whitespace": True},
            **changes,
        )
        for number in numbers
    ]
    outputs = engine.generate([PROMPTS[number // 3 % 3] for number in numbers], params)
    return [output.outputs[0] for output in outputs]


def check(engine, count):
    engine._engine.speculation.reset_stats()
    outputs = write(engine, range(count))
    assert [output.finish_reason for output in outputs] == ["stop"] * count
    assert sum(is_valid(output.text) for output in outputs) == count
    stats = engine._engine.speculation.stats
    assert stats.num_accepted_tokens > count * sum(map(len, KEYS)) / 2


def test_documents_are_valid_and_those_without_drafts(engine):
    check(engine, 9)
    with_drafts, without = write(engine, range(9), logprobs=1), write(engine, range(9), logprobs=1, speculation=False)
    for drafted, plain in zip(with_drafts, without, strict=True):
        assert drafted.token_ids == plain.token_ids
        assert drafted.cumulative_logprob == pytest.approx(plain.cumulative_logprob, rel=1e-4)


@pytest.mark.thorough
def test_two_hundred_of_two_hundred_documents_are_valid(engine):
    check(engine, 200)
