import dataclasses
import json
import pickle

import msgspec
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.errors import RequestError
from ulysses_infer.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.structured_outputs import StructuredOutputs


def refusal(**values) -> str:
    with pytest.raises(RequestError) as raised:
        SamplingParams(**values)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 200
    return message


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.logprobs, params.prompt_logprobs, params.logit_bias) == (None, None, None)
    assert (params.stop, params.stop_token_ids, params.bad_words) == ([], [], [])
    assert (params.skip_special_tokens, params.detokenize) == (True, True)
    assert (params.ignore_eos, params.include_stop_str_in_output) == (False, False)


WRONG_VALUES = [
    *[("n", value) for value in (0, -1, True, 1.5, "2", None, 10**9)],
    *[("temperature", value) for value in (-0.1, 2.1, float("nan"), float("inf"), True, "1", None, 10**400)],
    *[("top_p", value) for value in (0.0, -0.5, 1.01, float("nan"), False, "0.9")],
    *[("top_k", value) for value in (-2, 0.5, True, "5", 10**30)],
    *[("min_p", value) for value in (-0.1, 1.1, float("nan"), float("-inf"), True)],
    *[("seed", value) for value in (1.5, True, "1", 2**63, -(2**63) - 1)],
    *[("max_tokens", value) for value in (0, -1, True, 1.0, 10**5000)],
    *[("min_tokens", value) for value in (-1, True, 0.5)],
    *[("presence_penalty", value) for value in (-2.1, 2.1, float("nan"), "x")],
    *[("frequency_penalty", value) for value in (-2.1, 2.1, float("nan"), True)],
    *[("repetition_penalty", value) for value in (0.0, -1.0, float("nan"), float("inf"), 1e6, True)],
    *[("logprobs", value) for value in (-2, True, 1.5)],
    *[("prompt_logprobs", value) for value in (-2, False, "all")],
    *[("stop", value) for value in ("", [""], [1], 5, 0, False, {"a": 1}, b"x", [None])],
    *[("stop_token_ids", value) for value in ([-1], [1.5], [True], "12", 7, [2**31], {3: 1})],
    *[("allowed_token_ids", value) for value in ([], [-1], ["x"], 3, [[1]])],
    *[("bad_words", value) for value in ("word", [""], [1])],
    *[("logit_bias", value) for value in ([1], {"x": 1.0}, {-1: 1.0}, {1: float("nan")}, {1: 101}, {1: "a"})],
    *[("logit_bias", value) for value in ({1.5: 1}, {True: 1}, {"²": 1}, {"9" * 5000: 1})],
    *[("detokenize", value) for value in (1, "yes", None)],
    *[("ignore_eos", value) for value in (0, "no")],
    *[("skip_special_tokens", value) for value in (1, None)],
    *[("include_stop_str_in_output", value) for value in (1, "x")],
    *[("structured_outputs", value) for value in (3, "json", {}, {"jsn": {}}, {"json": {}, "regex": "a"}, {"json": 3})],
    *[
        ("structured_outputs", value)
        for value in ({"choice": []}, {"choice": "ab"}, {"choice": [""]}, {"choice": ["\ud800"]})
    ],
    *[
        ("structured_outputs", value)
        for value in ({"regex": ""}, {"regex": 5}, {"grammar": "x" * 10**6}, {"regex": "\udfff"})
    ],
    *[
        ("structured_outputs", value)
        for value in ({"json_object": False}, {"json_object": 1}, {"json": {"a": float("nan")}})
    ],
    ("structured_outputs", {"json": {}, "disable_any_whitespace": "no"}),
]


@pytest.mark.parametrize(
    ("name", "value"), WRONG_VALUES, ids=[f"{name}-{index}" for index, (name, _) in enumerate(WRONG_VALUES)]
)
def test_wrong_value_is_refused_in_one_line_that_names_the_field(name, value):
    assert refusal(**{name: value}).startswith(name)


def test_refusal_names_value_and_remedy():
    assert refusal(temperature=-1) == "temperature is out of range, got -1; use a number from 0 to 2"
    assert refusal(top_p=0) == "top_p is out of range, got 0; use a number above 0 up to 1"
    assert refusal(n=True) == "n must be an integer, got True; use 1 to 16384"
    assert "exactly one of" in refusal(structured_outputs={"regex": "a", "choice": ["a"]})
    assert "did you mean 'regex'?" in refusal(structured_outputs={"regexp": "a"})


STRUCTURES = [
    {"json": {"type": "object", "properties": {"é": {"type": "string"}}}},
    {"json": '{"type": "object"}', "disable_any_whitespace": True},
    {"regex": "a+"},
    {"choice": ["a", "b"]},
    {"grammar": 'start: "a"'},
    {"json_object": True},
]


@pytest.mark.parametrize("wanted", STRUCTURES, ids=str)
def test_parameters_travel_as_plain_mappings(wanted):
    params = SamplingParams(structured_outputs=wanted, stop="x", logit_bias={3: 1.0}, max_tokens=None, n=2)
    mapping = params.to_mapping()
    assert SamplingParams.from_mapping(json.loads(json.dumps(mapping))) == params
    assert SamplingParams.from_mapping(msgspec.msgpack.decode(msgspec.msgpack.encode(mapping))) == params
    assert set(mapping) == {"structured_outputs", "stop", "logit_bias", "max_tokens", "n"}
    assert params.clone() == params


def test_defaults_are_left_out_of_the_mapping():
    assert SamplingParams().to_mapping() == {}
    assert SamplingParams(stop=[], seed=-1, top_k=-1).to_mapping() == {}


def test_a_schema_given_as_text_or_mapping_is_the_same():
    assert StructuredOutputs(json={"a": 1}) == StructuredOutputs(json='{"a":1}')


def test_message_of_a_value_with_many_lines_is_one_line():
    refusal(stop=numpy.ones((20, 20)))


def test_combinations_that_contradict_are_refused():
    assert "max_tokens=2" in refusal(min_tokens=3, max_tokens=2)
    assert "detokenize" in refusal(stop="x", detokenize=False)
    assert "best_of is 3" in refusal(n=2, best_of=3)


def test_equal_outputs_are_computed_once():
    greedy = SamplingParams(n=3, best_of=3, temperature=0)
    assert (greedy.num_distinct, greedy.as_computed().n) == (1, 1)
    assert SamplingParams(n=3).as_computed().n == 3


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@settings(max_examples=500)
@given(
    field=st.sampled_from([field.name for field in dataclasses.fields(SamplingParams)]),
    value=SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(SCALARS, SCALARS, max_size=3),
)
def test_any_value_is_taken_or_refused_with_one_line(field, value):
    try:
        SamplingParams(**{field: value})
    except RequestError:
        refusal(**{field: value})


def test_values_are_normalised():
    params = SamplingParams(
        stop="end", stop_token_ids=(5, 5, 3), logit_bias={"7": 1, 8: -2}, top_k=-1, seed=-1, temperature=1
    )
    assert params.stop == ["end"]
    assert params.stop_token_ids == [5, 3]
    assert params.logit_bias == {7: 1.0, 8: -2.0}
    assert params.top_k == 0
    assert params.seed is None
    assert isinstance(params.temperature, float)


def test_numpy_numbers_become_plain_ones():
    params = SamplingParams(top_k=numpy.int64(4), temperature=numpy.float32(0.5))
    assert type(params.top_k) is int
    assert type(params.temperature) is float


def test_unknown_key_names_the_nearest():
    with pytest.raises(RequestError, match="unknown sampling parameter 'temprature'; did you mean 'temperature'"):
        SamplingParams.from_mapping({"temprature": 0.5})
    with pytest.raises(RequestError, match="known: n, "):
        SamplingParams.from_mapping({"zzzzzz": 1})
    with pytest.raises(RequestError, match="mapping"):
        SamplingParams.from_mapping([1])


def test_none_in_a_mapping_is_the_default_except_for_max_tokens():
    params = SamplingParams.from_mapping({"temperature": None, "top_k": None, "max_tokens": None, "seed": None})
    assert (params.temperature, params.top_k, params.max_tokens) == (1.0, 0, None)


def test_token_ids_outside_the_vocabulary_are_refused():
    for values in ({"stop_token_ids": [99, 100]}, {"allowed_token_ids": [100]}, {"logit_bias": {100: 1}}):
        params = SamplingParams(**values)
        params.validate_for(101)
        with pytest.raises(RequestError, match="token id 100, outside the vocabulary; use 0 to 99"):
            params.validate_for(100)


def test_more_log_probabilities_than_tokens_are_refused():
    SamplingParams(logprobs=100, prompt_logprobs=-1).validate_for(100)
    with pytest.raises(RequestError, match="logprobs is 101"):
        SamplingParams(logprobs=101).validate_for(100)


def test_clone_is_independent_and_checked_again():
    params = SamplingParams(stop=["a"], logit_bias={1: 1.0})
    clone = params.clone(n=2)
    clone.stop.append("b")
    clone.logit_bias[2] = 1.0
    assert (params.stop, params.logit_bias, params.n, clone.n) == (["a"], {1: 1.0}, 1, 2)
    params.temperature = -3
    with pytest.raises(RequestError, match="temperature"):
        params.clone()


class LetterTokenizer:
    """One token per letter; a space before a letter is part of its token."""

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        words = text.split(" ")
        spaced = [(index > 0 and place == 0, c) for index, word in enumerate(words) for place, c in enumerate(word)]
        return [ord(character) + 1000 * has_space for has_space, character in spaced]


class StrippingTokenizer:
    """One token per letter; spaces at the start are dropped."""

    def encode(self, text, *, add_special_tokens):
        return [ord(character) for character in text.lstrip()]


def test_bad_words_are_forbidden_with_and_without_a_space():
    params = SamplingParams(bad_words=[" ab", "c"])
    assert params.encode_bad_words(LetterTokenizer()) == [[97, 98], [1097, 98], [99], [1099]]
    assert SamplingParams(bad_words=["ab"]).encode_bad_words(StrippingTokenizer()) == [[97, 98]]
    with pytest.raises(RequestError, match="no tokens"):
        SamplingParams(bad_words=["  "]).encode_bad_words(LetterTokenizer())


def test_metrics_follow_their_definitions():
    metrics = RequestMetrics(10.0)
    assert (metrics.ttft, metrics.tpot, metrics.time_in_queue, metrics.e2e_latency) == (
        None,
        None,
        None,
        None,
    )
    metrics = RequestMetrics(10.0, 10.5, 11.0, 14.0, 14.25, num_output_tokens=4)
    assert (metrics.time_in_queue, metrics.ttft, metrics.tpot, metrics.e2e_latency) == (0.5, 1.0, 1.0, 4.25)
    metrics.num_output_tokens = 1
    assert metrics.tpot is None


def test_outputs_and_params_survive_pickling():
    completion = CompletionOutput(0, "hi", [1, 2], -0.5, [{1: Logprob(-0.5, 1, "hi")}], "stop", "end")
    output = RequestOutput("r", "p", [1], [completion], True, [None], 0, RequestMetrics(1.0))
    assert pickle.loads(pickle.dumps(output)) == output
    params = SamplingParams(stop="x", logit_bias={1: 2.0})
    assert pickle.loads(pickle.dumps(params)) == params
