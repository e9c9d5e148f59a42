"""Requests with any options, and the comparison of their outputs with and without drafted tokens."""

import pytest
from hypothesis import strategies as st

from tests.tiny import EOS, encode

TEXTS = ["abcabcabcabcabc", "hello hello hello", "the quick brown fox", "zz", "{'a': 1, 'a': 1, 'a': "]
SCHEMA = {
    "type": "object",
    "properties": {"a_long_name": {"type": "boolean"}, "another": {"enum": ["aa", "bb"]}},
    "required": ["a_long_name", "another"],
    "additionalProperties": False,
}
structures = st.sampled_from(
    [{"json": SCHEMA, "disable_any_whitespace": True}, {"regex": "(abc){3,9}d"}, {"choice": ["hello hello", "hello"]}]
)
options = st.fixed_dictionaries(
    # without penalties that reward repetition, a random model repeats nothing, and nothing would be accepted
    {"temperature": st.sampled_from([0, 0, 0.4, 1.0]), "max_tokens": st.integers(1, 40), "seed": st.integers(0, 9)},
    optional={
        "n": st.integers(1, 3),
        "top_k": st.sampled_from([1, 5]),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.just(0.1),
        "min_tokens": st.integers(0, 12),
        "stop": st.sampled_from([["a"], ["zz", "Q"], ["bc"]]),
        "bad_words": st.just(["ab", "x"]),
        "stop_token_ids": st.just(encode("kq")),
        "allowed_token_ids": st.just([*encode("abchelo {}':1"), EOS]),
        "logit_bias": st.just({encode("b")[0]: 3.0}),
        "logprobs": st.sampled_from([0, 2]),
        "prompt_logprobs": st.just(1),
        "repetition_penalty": st.sampled_from([0.7, 1.2]),
        "presence_penalty": st.just(-2),
        "frequency_penalty": st.just(-1),
        "ignore_eos": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
        "structured_outputs": structures,
    },
)


def _possible(wanted):
    """With no more `min_tokens` than `max_tokens`."""
    return {**wanted, "min_tokens": min(wanted.get("min_tokens", 0), wanted["max_tokens"])}


batches = st.lists(st.tuples(st.sampled_from(TEXTS), options.map(_possible)), min_size=1, max_size=5)


def plain(output):
    return [(each.token_ids, each.text, each.finish_reason, each.stop_reason) for each in output.outputs]


def logprobs(output):
    listed = [entry for each in output.outputs for entry in each.logprobs or ()] + (output.prompt_logprobs or [])
    return [{token: scored.logprob for token, scored in entry.items()} for entry in listed if entry is not None]


def assert_equal(output, expected):
    """Equal tokens, texts and reasons; log-probabilities up to rounding."""
    assert plain(output) == plain(expected)
    for mine, theirs in zip(logprobs(output), logprobs(expected), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    for mine, theirs in zip(output.outputs, expected.outputs, strict=True):
        assert mine.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-2)
