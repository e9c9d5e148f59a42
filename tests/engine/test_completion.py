"""Log-probability entries and the outputs of a request with several sequences, in vLLM's shapes."""

import math

import pytest
import torch

from tests.tiny import encode, write_tokenizer
from ulysses_infer.config import ModelConfig
from ulysses_infer.engine.completion import Completion, Sequence, TokenScores
from ulysses_infer.engine.request import Request, RequestStatus
from ulysses_infer.model.sampling.row import SamplingRow
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.text.detokenizer import Detokenizer, TokenDecoder
from ulysses_infer.text.prompts import load_tokenizer

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return TokenDecoder(load_tokenizer(ModelConfig(path=str(folder)), folder))


def test_the_chosen_token_comes_first_then_the_likeliest():
    (entry,) = TokenScores(LOGITS[:1], torch.tensor([2]), [2]).entries(None)
    assert list(entry) == [2, 1, 3]
    assert [value.rank for value in entry.values()] == [3, 1, 2]
    assert entry[1].logprob == pytest.approx(float(LOGITS[0].log_softmax(0)[1]))


def test_a_chosen_token_among_the_likeliest_is_listed_once():
    (entry,) = TokenScores(LOGITS[:1], torch.tensor([1]), [2]).entries(None)
    assert list(entry) == [1, 3]
    assert entry[1].rank == 1


def test_no_likeliest_tokens_leave_the_chosen_one():
    (entry,) = TokenScores(LOGITS[:1], torch.tensor([4]), [0]).entries(None)
    assert list(entry) == [4]
    assert entry[4].rank == 5


def test_minus_one_is_the_whole_vocabulary():
    (entry,) = TokenScores(LOGITS[:1], torch.tensor([4]), [-1]).entries(None)
    assert sorted(entry) == [0, 1, 2, 3, 4]
    assert math.fsum(math.exp(value.logprob) for value in entry.values()) == pytest.approx(1.0)


def test_rows_may_request_different_counts():
    one, all_of_them = TokenScores(LOGITS, torch.tensor([1, 0]), [1, -1]).entries(None)
    assert (len(one), len(all_of_them)) == (1, 5)
    assert all_of_them[0].logprob == pytest.approx(math.log(0.2))


def test_tokens_are_shown_as_text(decoder):
    logits = torch.zeros(1, 99)
    (entry,) = TokenScores(logits, torch.tensor(encode("x")), [0]).entries(decoder)
    assert entry[encode("x")[0]].decoded_token == "x"


def make_sequence(index, decoder=None, output="", **params):
    chosen = SamplingParams(**{"temperature": 0.5, "max_tokens": 9, **params})
    request = Request(f"r#{index}", index, encode("ab"), chosen, arrival_time=10.0)
    row = SamplingRow(chosen, 0, request.prompt_token_ids, request.output_token_ids)
    sequence = Sequence(request, row, Detokenizer(decoder, chosen, request.prompt_token_ids))
    for token in encode(output):
        request.append_token(token, now=11.0 + request.num_output_tokens)
        sequence.take_tokens()
    return sequence


def finish(sequence, reason, now):
    sequence.request.status, sequence.request.finish_reason = RequestStatus.FINISHED, reason
    sequence.request.finish_time = now


def test_an_output_lists_every_sequence(decoder):
    completion = Completion("r", "ab", encode("ab"), SamplingParams(temperature=0.5, n=2))
    completion.sequences += [make_sequence(0, decoder, "xyz"), make_sequence(1, decoder, "w")]
    output = completion.output()
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "ab", encode("ab"))
    assert [(o.index, o.text, o.token_ids) for o in output.outputs] == [
        (0, "xyz", encode("xyz")),
        (1, "w", encode("w")),
    ]
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None
    assert not output.finished


def test_a_request_is_finished_when_its_last_sequence_is(decoder):
    completion = Completion("r", "ab", encode("ab"), SamplingParams(temperature=0.5, n=2))
    completion.sequences += [make_sequence(0, decoder, "xyz"), make_sequence(1, decoder, "w")]
    finish(completion.sequences[0], "length", now=20.0)
    unfinished = completion.output()
    assert (unfinished.finished, unfinished.metrics.finished_time) == (False, None)
    finish(completion.sequences[1], "stop", now=30.0)
    output = completion.output()
    assert output.finished
    assert [o.finish_reason for o in output.outputs] == ["length", "stop"]
    metrics = output.metrics
    assert (metrics.first_token_time, metrics.last_token_time, metrics.finished_time) == (11.0, 13.0, 30.0)
    assert (metrics.ttft, metrics.e2e_latency, metrics.num_output_tokens) == (1.0, 20.0, 3)


def test_outputs_are_snapshots(decoder):
    sequence = make_sequence(0, decoder, "x", logprobs=0)
    completion = Completion("r", "ab", encode("ab"), sequence.request.params, [sequence])
    before = completion.output()
    sequence.request.append_token(encode("y")[0], now=12.0)
    sequence.logprobs.append({})
    assert before.outputs[0].token_ids == encode("x")
    assert before.outputs[0].logprobs == []


def test_a_stop_string_is_reported_and_cut(decoder):
    sequence = make_sequence(0, decoder, "xy", stop=["yz"])
    sequence.request.append_token(encode("z")[0], now=12.0)
    assert sequence.take_tokens() == "yz"
    assert sequence.output(0).text == "x"


@pytest.mark.parametrize(("included", "text"), [(False, "x"), (True, "xy")])
def test_a_stop_token_is_in_the_text_only_if_asked_for(decoder, included, text):
    sequence = make_sequence(0, decoder, "x", stop_token_ids=encode("y"), include_stop_str_in_output=included)
    sequence.request.append_token(encode("y")[0], now=12.0)
    finish(sequence, "stop", now=12.0)
    sequence.take_tokens()
    assert sequence.output(0).text == text
    assert sequence.output(0).token_ids == encode("xy")
