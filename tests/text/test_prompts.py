"""What users give as a prompt, and what it becomes."""

import pytest

from tests.tiny import EOS, VOCABULARY, encode, write_tokenizer
from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import CheckpointError, RequestError
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.text.prompts import PromptReader, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(ModelConfig(path=str(folder)), folder)


@pytest.fixture
def reader(tokenizer):
    return PromptReader(tokenizer, len(VOCABULARY), frozenset({EOS}), seed=0)


@pytest.fixture
def bare():
    return PromptReader(None, len(VOCABULARY), frozenset(), seed=0)


def test_text_is_encoded(reader):
    assert reader.read("hi there") == ("hi there", encode("hi there"))


def test_token_ids_are_taken_as_they_are(reader, bare):
    for each in (reader, bare):
        assert each.read([5, 6, 7]) == (None, [5, 6, 7])
        assert each.read((5, 6)) == (None, [5, 6])


def test_messages_go_through_the_chat_template(reader):
    messages = [{"role": "user", "content": "hi"}]
    assert reader.read(messages) == ("[user]hi[a]", encode("[user]hi[a]"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([1, -1], "prompt token id -1 is outside the vocabulary; use 0 to 98"),
        ([99], "prompt token id 99 is outside the vocabulary; use 0 to 98"),
        ([1, 10**30], "is outside the vocabulary"),
        ([1, 2.0], "must be integers, not 2.0"),
        ([True], "must be integers, not True"),
        ([1, "a"], "must be integers, not 'a'"),
        (None, "not NoneType"),
        (7, "not int"),
        ({"prompt": "x"}, "not dict"),
        ([{"role": "system", "content": "x"}], "the chat template refuses these messages: no system role"),
    ],
)
def test_a_bad_prompt_is_one_line(reader, prompt, message):
    with pytest.raises(RequestError) as caught:
        reader.read(prompt)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_tokenizer_text_is_refused(bare):
    with pytest.raises(RequestError, match=r"set model\.tokenizer"):
        bare.read("hi")
    with pytest.raises(RequestError, match="no chat template"):
        bare.read([{"role": "user", "content": "hi"}])
    with pytest.raises(RequestError, match="bad_words needs a tokenizer"):
        bare.bad_words(SamplingParams(bad_words=["x"]))


def test_bad_words_become_token_sequences(reader, bare):
    assert reader.bad_words(SamplingParams(bad_words=["ab"])) == [encode("ab")]
    assert bare.bad_words(SamplingParams()) == []


def test_a_request_keeps_its_own_seed_and_others_get_ones_that_can_be_had_again(tokenizer):
    first, again, other = (PromptReader(tokenizer, 99, frozenset(), seed) for seed in (0, 0, 1))
    assert first.seed(SamplingParams(seed=41)) == 41
    drawn = [first.seed(SamplingParams()) for _ in range(3)]
    assert len(set(drawn)) == 3
    assert [again.seed(SamplingParams()) for _ in range(3)] == drawn
    assert [other.seed(SamplingParams()) for _ in range(3)] != drawn


def test_a_checkpoint_without_tokenizer_files_has_none(tmp_path):
    assert load_tokenizer(ModelConfig(path=str(tmp_path)), tmp_path) is None
    assert load_tokenizer(ModelConfig(path="-"), None) is None


def test_the_tokenizer_of_the_recipe_wins(tmp_path):
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "other")
    settings = ModelConfig(path=str(tmp_path / "model"), tokenizer=str(tmp_path / "other"))
    assert load_tokenizer(settings, tmp_path / "model").encode("a") == encode("a")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "none"}}', '{"version": "9"}'])
def test_an_unreadable_tokenizer_is_one_line(tmp_path, text):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(ModelConfig(path=str(tmp_path)), tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
