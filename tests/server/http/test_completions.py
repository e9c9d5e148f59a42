from __future__ import annotations

import openai
import pytest

from tests.server.http.harness import MODEL, Served
from tests.tiny import EOS, encode


def test_a_completion_has_the_shape_that_the_client_expects(server: Served) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt="abc", max_tokens=5)
    assert answer.choices[0].text == "hello"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_end_of_sequence_is_a_stop_and_no_text(server: Served) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt="abc", max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hello world", "stop")
    assert answer.choices[0].stop_reason is None
    assert answer.usage.completion_tokens == len("hello world") + 1


def test_sampling_fields_reach_the_engine(server: Served) -> None:
    server.openai.completions.create(
        model=MODEL,
        prompt="abc",
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["x"],
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"5": -1.0},
        user="someone",
        extra_body={
            "top_k": 4,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "min_tokens": 2,
            "stop_token_ids": [9],
            "bad_words": ["bad"],
            "allowed_token_ids": [5, 6],
            "priority": 3,
            "cache_salt": "salt",
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
        },
    )
    submit = server.engine.submits[0]
    assert submit.params == {
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["x"],
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {5: -1.0},
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 2,
        "stop_token_ids": [9],
        "bad_words": ["bad"],
        "allowed_token_ids": [5, 6],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    assert (submit.priority, submit.cache_salt) == (3, "salt")


def test_a_stop_string_is_cut_off_and_named(server: Served) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt="abc", max_tokens=50, stop="o w")
    assert (answer.choices[0].text, answer.choices[0].stop_reason) == ("hell", "o w")


def test_a_stop_string_may_be_kept(server: Served) -> None:
    answer = server.post("/v1/completions", {"prompt": "a", "stop": "lo", "include_stop_str_in_output": True}).json()
    assert answer["choices"][0]["text"] == "hello"


def test_a_stop_token_is_named_and_no_text(server: Served) -> None:
    body = {"prompt": "a", "stop_token_ids": encode("o")}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hell", "stop", encode("o")[0])


@pytest.mark.parametrize("prompt", ["ab", ["ab"], encode("ab"), [encode("ab")]])
def test_every_kind_of_prompt_is_read(server: Served, prompt: object) -> None:
    answer = server.post("/v1/completions", {"prompt": prompt, "echo": True, "max_tokens": 2}).json()
    assert answer["choices"][0]["text"] == "abhe"
    assert server.engine.submits[0].token_ids == encode("ab")


def test_several_prompts_and_sequences_come_in_order(server: Served) -> None:
    server.script(text=lambda submit, index: f"{len(submit.token_ids)}:{index}")
    answer = server.openai.completions.create(model=MODEL, prompt=["a", "bb", "ccc"], n=2)
    assert [choice.text for choice in answer.choices] == ["1:0", "1:1", "2:0", "2:1", "3:0", "3:1"]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == 6


def test_streams_of_several_prompts_are_interleaved_with_right_indices(server: Served) -> None:
    server.script(text=lambda submit, index: f"{len(submit.token_ids)}:{index}", seconds=0.002)
    texts: dict[int, str] = {}
    seen = []
    for chunk in server.openai.completions.create(model=MODEL, prompt=["a", "bb"], n=2, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        seen.append(choice.index)
    assert texts == {0: "1:0", 1: "1:1", 2: "2:0", 3: "2:1"}
    assert seen != sorted(seen)


def test_logprobs_have_the_legacy_format(server: Served) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt="abc", max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["h", "e", "l"]
    assert logprobs.token_logprobs == [-2.5, -2.5, -2.5]
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs[0] == {" ": -1.5, "h": -2.5}


def test_streamed_logprobs_join_to_those_of_a_whole_answer(server: Served) -> None:
    body = {"prompt": "abc", "max_tokens": 6, "logprobs": 1, "echo": True, "stop": "lo"}
    whole = server.openai.completions.create(model=MODEL, **body).choices[0]
    joined: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    text = ""
    for chunk in server.openai.completions.create(model=MODEL, stream=True, **body):
        text += chunk.choices[0].text
        for name, values in joined.items():
            values += getattr(chunk.choices[0].logprobs, name)
    assert text == whole.text == "abchel"
    assert joined == {name: getattr(whole.logprobs, name) for name in joined}


def test_the_prompt_is_scored_without_a_token_of_output(server: Served) -> None:
    """As lm-eval requests it."""
    body = {"prompt": encode("abc"), "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    answer = server.post("/v1/completions", body).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert choice["logprobs"]["token_logprobs"] == [None, -2.5, -2.5]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 0
    assert server.engine.submits[0].params["max_tokens"] == 1


def test_tokens_can_be_written_as_ids(server: Served) -> None:
    body = {"prompt": "a", "max_tokens": 1, "logprobs": 0, "return_tokens_as_token_ids": True}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{encode('h')[0]}"]


def test_token_ids_are_returned_on_request(server: Served) -> None:
    choice = server.post("/v1/completions", {"prompt": "ab", "return_token_ids": True}).json()["choices"][0]
    assert choice["token_ids"] == [*encode("hello world"), EOS]
    assert choice["prompt_token_ids"] == encode("ab")


def test_prompt_logprobs_have_vllms_format(server: Served) -> None:
    choice = server.post("/v1/completions", {"prompt": "ab", "prompt_logprobs": 1}).json()["choices"][0]
    (b,) = encode("b")
    assert choice["prompt_logprobs"] == [None, {str(b): {"logprob": -2.5, "rank": 2, "decoded_token": "b"}}]


def test_cached_tokens_are_reported(server: Served) -> None:
    server.script(num_cached_tokens=2)
    answer = server.openai.completions.create(model=MODEL, prompt=["abc", "def"])
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


@pytest.mark.parametrize(
    ("field", "constraint"),
    [
        ({"guided_json": {"type": "object"}}, {"json": '{"type":"object"}'}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": "start: /a/"}, {"grammar": "start: /a/"}),
        ({"structured_outputs": {"json": {"type": "array"}}}, {"json": '{"type":"array"}'}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "string"}}}},
            {"json": '{"type":"string"}'},
        ),
        (
            {"response_format": {"type": "json_object"}, "guided_whitespace_pattern": r"\s*"},
            {"json_object": True, "whitespace_pattern": r"\s*"},
        ),
        (
            {"structured_outputs": {"json_object": True, "whitespace_pattern": ""}},
            {"json_object": True, "whitespace_pattern": ""},
        ),
        ({"response_format": {"type": "text"}}, None),
    ],
)
def test_structured_output_fields_reach_the_engine(server: Served, field: dict, constraint: dict | None) -> None:
    answer = server.post("/v1/completions", {"prompt": "a", **field})
    assert answer.status_code == 200, answer.text
    assert server.engine.submits[0].params.get("structured_outputs") == constraint


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ["prompt is missing"]),
        ({"prompt": ""}, ["the prompt is empty"]),
        ({"prompt": []}, ["prompt should be a text"]),
        ({"prompt": [1, "a"]}, ["prompt should be a text"]),
        ({"prompt": [10**30]}, ["prompt should be a text"]),
        ({"prompt": [99]}, ["token id 99 is outside the vocabulary"]),
        ({"prompt": "a", "temperature": 3}, ["temperature should be less than or equal to 2, got 3"]),
        ({"prompt": "a", "temperature": "hot"}, ["temperature should be a valid number, got 'hot'"]),
        ({"promt": "a"}, ["unknown field 'promt'; did you mean 'prompt'?"]),
        ({"prompt": "a", "suffix": "b"}, ["suffix is not available"]),
        ({"prompt": "a", "best_of": 3}, ["best_of is 3"]),
        ({"prompt": "a", "max_tokens": 0}, ["max_tokens is 0"]),
        ({"prompt": "a", "min_tokens": 5, "max_tokens": 2}, ["min_tokens is 5"]),
        ({"prompt": "a", "stop": [""]}, ["stop has ''"]),
        ({"prompt": "a", "logit_bias": {"x": 1}}, ["logit_bias"]),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, ["stream_options needs stream"]),
        ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, ["prompt_logprobs cannot be streamed"]),
        ({"prompt": "a", "guided_regex": "a", "guided_choice": ["a"]}, ["guided_regex and guided_choice"]),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, ["json_schema.schema"]),
        ({"prompt": "a" * 200}, ["the prompt has 200 tokens"]),
    ],
)
def test_a_wrong_request_is_400_in_one_line(server: Served, body: dict, words: list[str]) -> None:
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    for word in words:
        assert word in error["message"]


def test_an_error_names_its_field(server: Served) -> None:
    assert server.post("/v1/completions", {"prompt": "a", "top_p": 0}).json()["error"]["param"] == "top_p"
    assert server.post("/v1/completions", {"prompt": "a", "stop": [""]}).json()["error"]["param"] == "stop"


def test_an_unknown_model_is_404(server: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.completions.create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found"


def test_an_id_in_use_is_refused(server: Served) -> None:
    server.script(num_tokens=1)
    with server.openai.completions.create(
        model=MODEL, prompt="a", stream=True, extra_body={"request_id": "mine"}
    ) as stream:
        assert next(iter(stream)).id == "cmpl-mine"
        answer = server.post("/v1/completions", {"prompt": "a", "request_id": "mine"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "id_in_use")
