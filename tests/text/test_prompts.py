"""The kinds of prompts, and the tokens they become."""

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


def test_bad_words_are_forbidden_as_text_and_special_tokens_by_id(reader, bare):
    assert reader.bad_words(SamplingParams(bad_words=["ab"])).completing(encode("a")).tolist() == encode("b")
    assert reader.bad_words(SamplingParams(bad_words=["</s>"])).completing([]).tolist() == [EOS]
    assert bare.bad_words(SamplingParams()) is None


def test_tokens_beyond_the_models_vocabulary_are_ignored(tokenizer):
    small = PromptReader(tokenizer, VOCABULARY.index("b"), frozenset({EOS, 98, 4000, -1}), seed=0)
    assert small.eos_token_ids == {EOS}
    assert small.bad_words(SamplingParams(bad_words=["b", "a"])).completing([]).tolist() == encode("a")


def test_text_that_the_tokenizer_refuses_is_one_line(reader):
    for use in (reader.read, lambda text: reader.bad_words(SamplingParams(bad_words=[text]))):
        with pytest.raises(RequestError, match="refuse") as caught:
            use("\ud800")
        assert "\n" not in str(caught.value)


def test_requests_without_a_seed_never_share_one(tokenizer):
    readers = [PromptReader(tokenizer, 99, frozenset(), None) for _ in range(2)]
    assert readers[0].seed(SamplingParams(seed=41)) == 41
    assert len({reader.seed(SamplingParams()) for reader in readers for _ in range(8)}) == 16


def test_a_seed_of_the_engine_makes_a_run_repeatable(tokenizer):
    first, again, other = (PromptReader(tokenizer, 99, frozenset(), seed) for seed in (0, 0, 1))
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
