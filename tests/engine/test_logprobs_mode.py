"""`runtime.logprobs_mode`: log-probabilities of the model, or of the distribution that tokens were drawn from."""

import math

import pytest
import torch

from tests.tiny import encode, settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.model.sampling.draw import draw
from ulysses_infer.model.sampling.drawable import drawable

PROMPT = "so it goes"
LETTERS = encode("abcdefgh")
CASES = {  # sampling parameters, and how many tokens can be drawn at most
    "plain": ({"temperature": 0}, None),
    "top_k": ({"temperature": 0.7, "top_k": 5}, 5),
    "top_p": ({"temperature": 1.5, "top_p": 0.3}, None),
    "allowed": ({"temperature": 1, "allowed_token_ids": LETTERS}, len(LETTERS)),
    "grammar": ({"temperature": 1, "structured_outputs": {"regex": "[ab]{9}"}}, 2),
    "penalties": ({"temperature": 0, "repetition_penalty": 2.0}, None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("logprobs")
    tiny_llama(made)
    return str(made)


def generate(folder, mode, **changes):
    params = [
        SamplingParams(max_tokens=7, seed=3, ignore_eos=True, logprobs=-1, **given) for given, _ in CASES.values()
    ]
    with init_inference(folder, **settings(**{"runtime.logprobs_mode": mode, **changes})) as engine:
        return [output.outputs[0] for output in engine.generate([PROMPT] * len(params), params)]


@pytest.fixture(scope="module")
def raw(folder):
    return generate(folder, "raw_logprobs")


@pytest.mark.parametrize("method", ["none", "suffix"])
def test_processed_logprobs_are_those_of_the_tokens_that_could_be_drawn(folder, raw, method):
    found = generate(folder, "processed_logprobs", **{"speculation.method": method})
    for (name, (given, most)), of_model, output in zip(CASES.items(), raw, found, strict=True):
        assert output.token_ids == of_model.token_ids
        for token, entry, before in zip(output.token_ids, output.logprobs, of_model.logprobs, strict=True):
            possible = {other: found.logprob for other, found in entry.items() if found.logprob > -math.inf}
            assert token in possible
            assert sum(map(math.exp, possible.values())) == pytest.approx(1, abs=1e-4)
            assert most is None or len(possible) <= most
            if name in ("top_k", "allowed"):  # the model's, at the temperature, among these tokens alone
                scaled = {other: before[other].logprob / given["temperature"] for other in possible}
                total = math.log(sum(map(math.exp, scaled.values())))
                assert possible == pytest.approx({other: value - total for other, value in scaled.items()}, abs=1e-4)
    for entry, of_model in zip(found[0].logprobs, raw[0].logprobs, strict=True):  # other batches: other orders of sums
        values = {token: each.logprob for token, each in of_model.items()}
        assert {token: each.logprob for token, each in entry.items()} == pytest.approx(values, abs=1e-5)
    assert found[-1].logprobs != raw[-1].logprobs


def test_log_probabilities_of_named_tokens_are_added(folder, raw):
    params = [SamplingParams(max_tokens=7, temperature=0, ignore_eos=True, logprob_token_ids=[3, 9])] * 2
    params.append(SamplingParams(max_tokens=7, temperature=0, ignore_eos=True, logprobs=1))
    with init_inference(folder, **settings()) as engine:
        *named, other = [output.outputs[0] for output in engine.generate([PROMPT] * 3, params)]
    for output in named:
        assert output.token_ids == raw[0].token_ids
        for token, entry, every in zip(output.token_ids, output.logprobs, raw[0].logprobs, strict=True):
            assert set(entry) == {token, 3, 9}
            assert all(entry[each].rank == every[each].rank for each in entry)
            values = {each: found.logprob for each, found in entry.items()}
            assert values == pytest.approx({each: every[each].logprob for each in entry}, abs=1e-5)
    assert all(len(entry) == 1 for entry in other.logprobs)


def test_tokens_are_drawn_with_the_probabilities_that_are_reported():
    params = SamplingParams(temperature=0.8, top_k=6, top_p=0.9, min_p=0.02)
    logits = torch.linspace(-2, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    expected = drawable(logits[None], [params]).softmax(-1)[0]
    count = 4096
    rows = logits.expand(count, -1)
    drawn = draw(rows, rows.amax(-1), [params] * count, [(i + 0.5) / count for i in range(count)])
    shares = drawn.bincount(minlength=12) / count
    assert torch.allclose(shares, expected, atol=2 / count)
