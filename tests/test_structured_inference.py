"""Structured outputs through `init_inference` on one rank."""

import json
import re

import pytest

from tests.tiny import EOS, encode, settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import RequestError

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
WANTED = {"json": SCHEMA, "disable_any_whitespace": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("llama")
    tiny_llama(made)
    return str(made)


@pytest.fixture(scope="module")
def engine(folder):
    with init_inference(folder, **settings()) as engine:
        yield engine
        engine._engine.scheduler.allocator.assert_idle()


def only(outputs):
    return outputs[0].outputs[0]


def test_a_random_models_output_fits_the_schema_and_ends_with_eos(engine):
    for seed in range(5):
        found = only(engine.generate("hello", SamplingParams(structured_outputs=WANTED, seed=seed, max_tokens=80)))
        assert found.finish_reason == "stop"
        assert found.stop_reason is None
        assert found.token_ids[-1] == EOS
        value = json.loads(found.text)
        assert set(value) == {"a", "b"}
        assert value["b"] in ("x", "y")


@pytest.mark.parametrize(
    "params",
    [
        {"ignore_eos": True},
        {"min_tokens": 20},
        {"allowed_token_ids": encode("ab")},
        {"ignore_eos": True, "logprobs": 2},
    ],
    ids=str,
)
def test_a_complete_output_ends_even_where_eos_is_not_allowed(engine, params):
    wanted = SamplingParams(structured_outputs={"regex": "ab{3}"}, temperature=0, max_tokens=30, **params)
    outputs = engine.generate(
        ["hello", "hello"], [wanted, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)]
    )
    found = outputs[0].outputs[0]
    assert (found.text, found.finish_reason, found.token_ids) == ("abbb", "stop", encode("abbb"))
    assert found.logprobs is None or len(found.logprobs) == 4
    assert len(outputs[1].outputs[0].token_ids) == 8


def test_a_stop_string_ends_a_structured_output_early(engine):
    params = SamplingParams(structured_outputs={"regex": "ab{30}"}, temperature=0, max_tokens=50, stop="bbb")
    found = only(engine.generate("hello", params))
    assert (found.text, found.finish_reason, found.stop_reason) == ("a", "stop", "bbb")


def test_contradicting_constraints_end_that_request_alone(engine):
    params = SamplingParams(structured_outputs={"regex": "ab"}, allowed_token_ids=encode("x"), temperature=0)
    outputs = engine.generate(["hello", "a"], [params, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)])
    assert outputs[0].outputs[0].finish_reason == "error"
    assert outputs[1].outputs[0].finish_reason == "length"


def test_every_sequence_follows_the_grammar_on_its_own(engine):
    params = SamplingParams(structured_outputs={"regex": "[a-z]{6}"}, n=4, seed=3, max_tokens=20)
    texts = [found.text for found in engine.generate("hello", params)[0].outputs]
    assert all(re.fullmatch("[a-z]{6}", text) for text in texts)
    assert len(set(texts)) == 4


def test_preemption_changes_nothing(folder):
    """A cache too small for all: sequences are computed again in the middle of their texts."""
    params = [
        SamplingParams(structured_outputs={"regex": "([a-z]{3}-){8}"}, seed=seed, max_tokens=60, temperature=1.5)
        for seed in range(6)
    ]
    found = {}
    for num_blocks in (120, 24):
        with init_inference(folder, **settings(**{"cache.num_blocks": num_blocks})) as engine:
            found[num_blocks] = [output.outputs[0].text for output in engine.generate(["hello"] * 6, params)]
            preempted = engine._engine.scheduler.num_preemptions
        assert all(re.fullmatch("([a-z]{3}-){8}", text) for text in found[num_blocks])
    assert preempted > 0
    assert found[24] == found[120]


def test_what_cannot_be_compiled_is_refused_before_anything_runs(engine):
    for wanted in ({"regex": "("}, {"json": {"not": {}}}, {"grammar": "start: x"}):
        with pytest.raises(RequestError, match="structured_outputs"):
            engine.generate(["hello", "a"], [SamplingParams(), SamplingParams(structured_outputs=wanted)])
    assert not engine._engine.has_unfinished


def test_without_a_tokenizer_they_are_refused(tmp_path):
    tiny_llama(tmp_path, tokenizer=False)
    with (
        init_inference(str(tmp_path), **settings()) as engine,
        pytest.raises(RequestError, match="structured_outputs needs a tokenizer"),
    ):
        engine.generate([1, 2, 3], SamplingParams(structured_outputs={"choice": ["a"]}))


def test_a_model_without_eos_ends_too(tmp_path):
    tiny_llama(tmp_path, eos_token_id=None)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    with init_inference(str(tmp_path), **settings()) as engine:
        params = SamplingParams(structured_outputs={"choice": ["yes", "no"]}, max_tokens=20)
        found = only(engine.generate("hello", params))
    assert found.text in ("yes", "no")
    assert found.finish_reason == "stop"
