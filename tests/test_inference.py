"""`init_inference` and its engine on one rank: inputs, outputs and refusals."""

import itertools
import json
import signal
import subprocess
import sys

import pytest
import torch

from tests.tiny import EOS, VOCABULARY, encode, settings
from ulysses_infer import LLM, SamplingParams, init_inference
from ulysses_infer.errors import CheckpointError, ConfigError, EngineDeadError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = ["hello", [5, 6, 7, 8, 9], "a", "the quick brown fox"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def shared(folder):
    with init_inference(folder, **settings()) as engine:
        yield engine


@pytest.fixture
def engine(shared):
    """The module's engine; every test leaves it idle with all its blocks."""
    yield shared
    assert not shared._engine.has_unfinished
    assert not shared._subscriptions
    shared._engine.scheduler.allocator.assert_idle()


def greedy(model, prompt, count):
    inputs = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    whole = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return whole[0, len(prompt) :].tolist()


def text_of(token_ids):
    return "".join(VOCABULARY[token] for token in token_ids if len(VOCABULARY[token]) == 1)


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


# -- generate ------------------------------------------------------------------------------------------------------


def test_greedy_tokens_are_transformers_own(engine, reference):
    outputs = engine.generate(PROMPTS, GREEDY)
    wanted = [greedy(reference, encode(p) if isinstance(p, str) else p, 8) for p in PROMPTS]
    assert tokens(outputs) == wanted
    assert [output.outputs[0].text for output in outputs] == [text_of(ids) for ids in wanted]
    assert [output.prompt for output in outputs] == ["hello", None, "a", "the quick brown fox"]
    assert outputs[0].prompt_token_ids == encode("hello")
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)


def test_one_prompt_needs_no_list(engine):
    assert tokens(engine.generate("hello", GREEDY)) == tokens(engine.generate(["hello"], GREEDY))
    assert tokens(engine.generate([5, 6, 7], GREEDY)) == tokens(engine.generate([[5, 6, 7]], GREEDY))


def test_no_prompts_give_no_outputs(engine):
    assert engine.generate([]) == []


def test_a_list_of_messages_is_one_chat(engine):
    messages = [{"role": "user", "content": "hi"}]
    (output,) = engine.generate(messages, GREEDY)
    assert output.prompt == "[user]hi[a]"
    assert len(engine.generate([messages, messages], GREEDY)) == 2


def test_every_prompt_may_have_its_own_parameters(engine):
    short, long = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), GREEDY
    outputs = engine.generate(["hello", "hello"], [short, long])
    assert [len(ids) for ids in tokens(outputs)] == [2, 8]
    assert tokens(outputs)[1][:2] == tokens(outputs)[0]


def test_callers_parameters_are_not_changed(engine):
    params = SamplingParams(temperature=0, max_tokens=3, stop=["zzz"])
    before = repr(params)
    engine.generate("hello", params)
    assert repr(params) == before


def test_late_prompts_give_what_they_give_alone(engine):
    steps = []
    outputs = engine.generate(PROMPTS, GREEDY, arrival_steps=[0, 3, 1, 30], on_step=steps.append)
    assert tokens(outputs) == [tokens(engine.generate([prompt], GREEDY))[0] for prompt in PROMPTS]
    first = {index: min(n for n, touched in enumerate(steps) if index in touched) for index in range(4)}
    assert first[0] < first[2] < first[1] < first[3]
    assert [sorted(touched) for touched in steps if 3 in touched] == [[3]] * 8, "nothing to wait for: it runs at once"


def test_on_step_sees_every_token_as_it_comes(engine):
    seen = []
    engine.generate(
        ["hello", "a"],
        GREEDY,
        on_step=lambda touched: seen.append({i: len(o.outputs[0].token_ids) for i, o in touched.items()}),
    )
    assert seen == [{0: n, 1: n} for n in range(1, 9)]


def test_n_sequences_differ_and_are_numbered(engine):
    params = SamplingParams(n=3, temperature=1.5, max_tokens=12, seed=3, ignore_eos=True)
    (output,) = engine.generate("hello", params)
    assert [o.index for o in output.outputs] == [0, 1, 2]
    assert len({tuple(o.token_ids) for o in output.outputs}) == 3
    (again,) = engine.generate("hello", params)
    assert [o.token_ids for o in again.outputs] == [o.token_ids for o in output.outputs]


# -- endings and constraints ---------------------------------------------------------------------------------------


def test_end_of_sequence_ends_the_text(engine):
    (output,) = engine.generate("hello", SamplingParams(temperature=0, logit_bias={EOS: 100.0}))
    only = output.outputs[0]
    assert (only.token_ids, only.text, only.finish_reason, only.stop_reason) == ([EOS], "", "stop", None)


def test_ignore_eos_goes_on(engine):
    (output,) = engine.generate(
        "hello", SamplingParams(temperature=0, max_tokens=4, logit_bias={EOS: 100.0}, ignore_eos=True)
    )
    assert output.outputs[0].token_ids == [EOS] * 4


def test_min_tokens_holds_the_ending_back(engine):
    params = SamplingParams(temperature=0, max_tokens=9, min_tokens=5, logit_bias={EOS: 100.0})
    (output,) = engine.generate("hello", params)
    assert len(output.outputs[0].token_ids) == 6
    assert output.outputs[0].token_ids[-1] == EOS


def test_a_stop_token_ends_the_text(engine):
    whole = tokens(engine.generate("hello", GREEDY))[0]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=[whole[3]])
    (output,) = engine.generate("hello", params)
    first = whole.index(whole[3])
    assert output.outputs[0].token_ids == whole[: first + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", whole[3])
    assert output.outputs[0].text == text_of(whole[:first])


def test_a_stop_string_ends_the_text_before_it(engine):
    text = engine.generate("hello", GREEDY)[0].outputs[0].text
    stop = text[3:5]
    for included in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=8, ignore_eos=True, stop=[stop], include_stop_str_in_output=included
        )
        only = engine.generate("hello", params)[0].outputs[0]
        end = text.index(stop) + (len(stop) if included else 0)
        assert (only.text, only.finish_reason, only.stop_reason) == (text[:end], "stop", stop)


def test_only_allowed_tokens_are_sampled(engine):
    allowed = encode("xyz")
    params = SamplingParams(temperature=1.0, max_tokens=20, allowed_token_ids=allowed, seed=0)
    (output,) = engine.generate("hello", params)
    assert set(output.outputs[0].token_ids) <= set(allowed)
    assert len(output.outputs[0].token_ids) == 20


def test_biased_tokens_win_and_banned_ones_never_come(engine):
    (x,) = encode("x")
    (output,) = engine.generate("hello", SamplingParams(temperature=0, max_tokens=5, logit_bias={x: 100.0}))
    assert output.outputs[0].text == "xxxxx"
    (banned,) = engine.generate(
        "hello", SamplingParams(temperature=0, max_tokens=5, logit_bias={x: 100.0}, bad_words=["xx"])
    )
    assert "xx" not in banned.outputs[0].text
    assert banned.outputs[0].text.startswith("x")


def test_a_request_that_allows_no_token_ends_alone(engine):
    (x,) = encode("x")
    impossible = SamplingParams(temperature=0, max_tokens=5, allowed_token_ids=[x], bad_words=["x"])
    outputs = engine.generate(["hello", "hello"], [impossible, GREEDY])
    assert outputs[0].outputs[0].finish_reason == "error"
    assert tokens(outputs)[1] == tokens(engine.generate("hello", GREEDY))[0]


def test_a_text_may_fill_the_models_length(engine):
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (output,) = engine.generate([5] * 100, params)
    assert len(output.outputs[0].token_ids) == 28
    assert output.outputs[0].finish_reason == "length"


# -- log-probabilities ---------------------------------------------------------------------------------------------


def test_log_probabilities_have_vllms_shapes_and_transformers_values(engine, reference):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    (output,) = engine.generate("hello", params)
    prompt, new = output.prompt_token_ids, output.outputs[0].token_ids
    with torch.inference_mode():
        wanted = reference(torch.tensor([prompt + new])).logits[0].log_softmax(-1)
    assert len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    for position, entry in enumerate([*output.prompt_logprobs[1:], *output.outputs[0].logprobs]):
        token = (prompt + new)[position + 1]
        row, count = wanted[position], 1 if position + 1 < len(prompt) else 2
        assert next(iter(entry)) == token
        assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert entry[token].decoded_token == VOCABULARY[token]
        best = row.topk(count).indices.tolist()
        assert set(entry) == {token, *best}
        assert [entry[other].rank for other in best] == list(range(1, count + 1))
    assert output.outputs[0].cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, new, strict=True))
    )


def test_log_probabilities_are_left_out_unless_asked_for(engine):
    (output,) = engine.generate("hello", GREEDY)
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_log_probabilities_of_the_whole_vocabulary_can_be_requested(engine):
    (output,) = engine.generate("hello", SamplingParams(temperature=0, max_tokens=1, logprobs=-1))
    assert len(output.outputs[0].logprobs[0]) == len(VOCABULARY)


def test_prompt_log_probabilities_are_complete_when_the_prompt_was_seen_before(engine):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompt = "a prompt that is long enough for a few blocks"
    engine.generate(prompt, GREEDY)
    first, second = engine.generate(prompt, params), engine.generate(prompt, params)
    for (output,) in (first, second):
        assert len(output.prompt_logprobs) == len(prompt)
        assert all(entry is not None for entry in output.prompt_logprobs[1:])


# -- seeds ---------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_tokens_in_any_batch(engine):
    params = [SamplingParams(temperature=1.0, max_tokens=10, seed=seed, ignore_eos=True) for seed in range(4)]
    alone = [tokens(engine.generate(prompt, each))[0] for prompt, each in zip(PROMPTS, params, strict=True)]
    assert tokens(engine.generate(PROMPTS, params)) == alone
    assert tokens(engine.generate(PROMPTS[::-1], params[::-1], arrival_steps=[0, 2, 4, 6])) == alone[::-1]


def test_without_a_seed_texts_differ_and_a_fresh_engine_repeats_them(folder):
    params = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True)
    runs = []
    for seed in (0, 0, 1):
        with init_inference(folder, **settings(**{"model.seed": seed})) as fresh:
            runs.append(tokens(fresh.generate(["hello"] * 2, params)))
    assert runs[0][0] != runs[0][1]
    assert runs[0] == runs[1] != runs[2]


# -- stream --------------------------------------------------------------------------------------------------------


def test_a_stream_yields_after_every_token(engine):
    outputs = list(engine.stream("hello", GREEDY))
    whole = tokens(engine.generate("hello", GREEDY))[0]
    assert [o.outputs[0].token_ids for o in outputs] == [whole[:n] for n in range(1, 9)]
    assert [o.finished for o in outputs] == [False] * 7 + [True]


def test_a_stream_closed_early_aborts_its_request(engine):
    stream = engine.stream("hello", GREEDY)
    next(stream)
    assert engine.stats()["num_requests_running"] == 1
    stream.close()
    assert engine.stats()["num_requests_running"] == 0


def test_a_loop_left_early_aborts_its_request(engine):
    for output in engine.stream("hello", GREEDY):
        if len(output.outputs[0].token_ids) == 3:
            break
    del output


def test_streams_may_be_read_in_turns(engine):
    alone = [
        list(engine.stream(prompt, GREEDY))[-1].outputs[0].token_ids for prompt in ("hello", "the quick brown fox")
    ]
    pairs = list(zip(engine.stream("hello", GREEDY), engine.stream("the quick brown fox", GREEDY), strict=True))
    assert [last.outputs[0].token_ids for last in pairs[-1]] == alone
    assert len(pairs) == 8


def test_generate_inside_a_stream_spares_it(engine):
    whole = tokens(engine.generate("hello", GREEDY))[0]
    stream = engine.stream("hello", GREEDY)
    next(stream)
    assert tokens(engine.generate("a", GREEDY)) == tokens(engine.generate("a", GREEDY))
    assert list(stream)[-1].outputs[0].token_ids == whole


def test_a_stream_ends_when_its_request_is_aborted(engine):
    seen = []
    for output in engine.stream("hello", GREEDY):
        seen.append(output)
        if len(seen) == 2:
            engine.abort(output.request_id)
    assert [o.finished for o in seen] == [False, False, True]
    assert seen[-1].outputs[0].finish_reason == "abort"


def test_a_stream_of_several_sequences_ends_with_the_last(engine):
    params = SamplingParams(n=2, temperature=1.0, max_tokens=4, seed=1, ignore_eos=True)
    last = list(engine.stream("hello", params))[-1]
    assert last.finished
    assert [len(o.token_ids) for o in last.outputs] == [4, 4]


def test_a_bad_prompt_is_refused_at_the_streams_first_step(engine):
    with pytest.raises(RequestError, match="empty"):
        next(engine.stream(""))


def test_aborting_an_unknown_request_does_nothing(engine):
    assert engine.abort("nobody") is None


# -- refusals ------------------------------------------------------------------------------------------------------

REFUSED = [
    ("", None, "the prompt is empty"),
    ([[]], None, "the prompt is empty"),
    ([99], None, "outside the vocabulary; use 0 to 98"),
    ([5] * 128, None, "128"),
    ("hello", {"temperature": 0}, "SamplingParams, not a dict"),
    ("hello", SamplingParams(stop_token_ids=[99]), "outside the vocabulary"),
    ("hello", SamplingParams(logprobs=100), "more than the 99 tokens"),
    (["hello", "a"], [GREEDY], "1 sampling params for 2 prompts"),
]


@pytest.mark.parametrize(("prompt", "params", "message"), REFUSED)
def test_a_bad_request_is_one_line_and_nothing_runs(engine, prompt, params, message):
    before = engine.stats()["modes"]
    with pytest.raises(RequestError) as caught:
        engine.generate(prompt, params)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert engine.stats()["modes"] == before


@pytest.mark.parametrize("arrivals", [None, [0, 0, 9]])
def test_a_bad_prompt_among_good_ones_is_refused_before_anything_runs(engine, arrivals):
    before = engine.stats()["modes"]
    with pytest.raises(RequestError, match="outside the vocabulary"):
        engine.generate(["hello", "a", [5, 1000]], GREEDY, arrival_steps=arrivals)
    assert engine.stats()["modes"] == before


def test_a_refused_request_leaves_others_unharmed(engine):
    whole = tokens(engine.generate("hello", GREEDY))[0]
    stream = engine.stream("hello", GREEDY)
    next(stream)
    with pytest.raises(RequestError):
        engine.generate(["a", ""], GREEDY)
    assert list(stream)[-1].outputs[0].token_ids == whole


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"top_p": 0}, {"n": 0}, {"max_tokens": 0}, {"top_k": -2}, {"repetition_penalty": 0}],
)
def test_absurd_sampling_values_are_refused(values):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    assert next(iter(values)) in str(caught.value)


def test_a_request_larger_than_the_cache_is_refused_and_others_run(folder):
    with init_inference(folder, **settings(**{"cache.num_blocks": 4})) as small:
        assert len(tokens(small.generate("hello", GREEDY))[0]) == 8
        with pytest.raises(RequestError) as caught:
            small.generate([5] * 30, GREEDY)
        assert "\n" not in str(caught.value)
        assert len(tokens(small.generate("hello", GREEDY))[0]) == 8


def test_a_cache_of_too_few_blocks_for_one_request_is_refused_at_start(folder):
    with pytest.raises(ConfigError, match=r"raise cache\.num_blocks to at least 32 or lower model\.max_model_len"):
        init_inference(folder, **settings(**{"cache.num_blocks": 4, "model.max_model_len": 128}))


def test_a_cache_too_small_for_one_request_is_refused_at_start(folder):
    overrides = settings(**{"cache.memory_bytes": 8192})
    del overrides["cache.num_blocks"]
    with pytest.raises(ConfigError, match=r"raise cache\.memory_bytes to at least \d+ or lower model\.max_model_len"):
        init_inference(folder, **overrides)


def start_on_three_ranks(folder):
    with pytest.raises(ConfigError, match=r"use sp \* tp = 1, 2, 4 or 8, or parallel\.pad_heads=auto"):
        init_inference(folder, **settings(3, 1, **{"parallel.pad_heads": "never"}))
    return True


@pytest.mark.distributed
def test_more_ranks_than_heads_divide_over_lists_what_would_work(folder, rank_pool):
    assert rank_pool(3).run(start_on_three_ranks, folder) == [True] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_one_line(folder):
    with pytest.raises(ConfigError, match=r"runtime\.device is cuda, but torch sees no GPU"):
        init_inference(folder, **settings(**{"runtime.device": "cuda"}))


def test_a_step_that_fails_ends_the_engine_in_one_line(folder, monkeypatch):
    with init_inference(folder, **settings()) as doomed:
        monkeypatch.setattr(doomed._engine.worker.model, "forward", lambda *_: 1 / 0)
        with pytest.raises(EngineDeadError) as caught:
            doomed.generate("hello", GREEDY)
        assert str(caught.value) == "a step failed and the engine ended: ZeroDivisionError: division by zero"
        with pytest.raises(EngineDeadError, match="shut down"):
            doomed.generate("hello", GREEDY)


# -- control -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("statik", {}, "static"),
        ("adaptive", {"exploration": 0.9}, "at most 0.5"),
        ("static", {"mode": [2, 1]}, r"\[2, 1\]"),
        ("static", {"mode": "fast"}, "mode"),
        ("threshold", {"threshold_token": 1}, "threshold_tokens"),
        ("threshold", {"threshold_tokens": -1}, "threshold_tokens"),
    ],
)
def test_an_invalid_policy_is_one_line_and_the_old_one_stays(engine, name, values, message):
    before = engine.stats()["policy"]
    with pytest.raises(ConfigError, match=message) as caught:
        engine.set_policy(name, **values)
    assert "\n" not in str(caught.value)
    assert engine.stats()["policy"] == before


def test_stats_count_steps_and_tokens(folder):
    with init_inference(folder, **settings()) as fresh:
        assert fresh.stats()["modes"] == {}
        fresh.generate("hello", GREEDY)
        stats = fresh.stats()
        assert stats["modes"]["sp1xtp1"]["steps"] == 8
        assert stats["modes"]["sp1xtp1"]["tokens"] == 12, "5 of the prompt, then all new tokens but the last"
        assert (stats["num_requests_running"], stats["num_requests_waiting"], stats["switches"]) == (0, 0, 0)
        assert stats["kv_cache_usage_perc"] == 0
        assert len(fresh.recent_steps) == 8
        json.dumps(stats)


@pytest.fixture
def interruptible():
    """Ctrl-C has Python's handler, also where the tests run in the background."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


def press(*_):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("way", ["generate", "stream"])
def test_control_c_aborts_the_requests_in_flight_and_the_engine_goes_on(engine, monkeypatch, way):
    handler, clock = signal.getsignal(signal.SIGINT), itertools.count(0, 100)
    monkeypatch.setattr(engine._interrupts, "_clock", lambda: next(clock))
    with monkeypatch.context() as patched:
        patched.setattr(engine._engine.stats, "record", press)
        with pytest.raises(KeyboardInterrupt):
            list(getattr(engine, way)("hello", GREEDY))
    assert not engine._engine.has_unfinished
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(tokens(engine.generate("hello", GREEDY))[0]) == 8


@pytest.mark.usefixtures("interruptible")
def test_a_second_control_c_in_a_step_ends_the_engine(folder):
    with init_inference(folder, **settings()) as doomed:
        with pytest.raises(KeyboardInterrupt):
            doomed.generate("hello", GREEDY, on_step=lambda touched: (press(), press()))
        with pytest.raises(EngineDeadError, match="shut down"):
            doomed.stats()


@pytest.mark.usefixtures("interruptible")
def test_a_second_control_c_soon_after_the_generation_ends_the_engine(folder):
    handler = signal.getsignal(signal.SIGINT)
    with init_inference(folder, **settings()) as doomed:
        with pytest.raises(KeyboardInterrupt):
            doomed.generate("hello", GREEDY, on_step=press)
        doomed.stats()
        with pytest.raises(KeyboardInterrupt):
            press()
        with pytest.raises(EngineDeadError, match="shut down"):
            doomed.stats()
    assert signal.getsignal(signal.SIGINT) is handler


def test_greedy_outputs_are_equal_and_computed_once(engine):
    params = SamplingParams(n=3, temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    before = engine.stats()["modes"]["sp1xtp1"]["tokens"]
    [whole] = engine.generate("hello", params)
    assert [output.index for output in whole.outputs] == [0, 1, 2]
    assert {tuple(output.token_ids) for output in whole.outputs} == {tuple(tokens(engine.generate("hello", GREEDY))[0])}
    assert engine.stats()["modes"]["sp1xtp1"]["tokens"] - before <= 2 * 12
    last = list(engine.stream("hello", params))[-1]
    assert [output.token_ids for output in last.outputs] == [output.token_ids for output in whole.outputs]


def test_no_mix_of_arguments_is_a_type_error(folder, monkeypatch):
    monkeypatch.setattr("ulysses_infer.inference.InferenceEngine", lambda config, model: config)

    assert init_inference(folder, model={"dtype": "float32"}).model.dtype == "float32"
    assert init_inference(folder, {"parallel": {"sp": 2}}, model={"dtype": torch.float32}).model.path == folder
    assert init_inference(model=folder, config={"model": {"dtype": "float32"}}).model.dtype == "float32"
    assert init_inference(model={"path": folder, "dtype": "float16"}).model.dtype == "float16"
    assert LLM(model=folder, dtype="half", seed=3).engine.model.seed == 3
    for arguments, named, words in [
        ((folder,), {"model": "other"}, "two models"),
        ((folder, {}), {"config": {}}, "two configs"),
        ((folder, {}, 3), {}, "3 positional arguments"),
        (({"dtype": "float32"},), {}, "the model is a mapping"),
        ((3,), {}, "model is a int"),
        ((folder, 3), {}, "config = 3"),
        ((folder,), {"model": {"path": "other"}}, "both set model.path"),
        ((folder,), {"parallel": 2}, "parallel is a section"),
        ((), {}, "model.path is not set"),
    ]:
        for call in (init_inference, LLM):
            with pytest.raises(ConfigError, match=r"^[^\n]+$") as caught:
                call(*arguments, **named)
            assert words in str(caught.value)


def test_an_engine_that_was_shut_down_reports_it(folder):
    with init_inference(folder, **settings()) as engine:
        engine.generate("hello", GREEDY)
    engine.shutdown()
    for call in (
        lambda: engine.generate("a"),
        engine.stats,
        lambda: next(engine.stream("a")),
        lambda: engine.abort("x"),
    ):
        with pytest.raises(EngineDeadError, match="shut down"):
            call()


def test_a_stream_left_open_at_shutdown_can_be_closed(folder):
    with init_inference(folder, **settings()) as engine:
        stream = engine.stream("hello", GREEDY)
        next(stream)
    with pytest.raises(EngineDeadError):
        next(stream)
    stream.close()


def test_weights_and_cache_go_with_the_shutdown(folder):
    import gc
    import weakref

    engine = init_inference(folder, **settings())
    kept = [
        weakref.ref(engine._rank.worker.cache.keys[0]),
        weakref.ref(next(engine._rank.worker.model.module.parameters())),
    ]
    engine.shutdown()
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


def test_the_largest_step_is_a_number_once_the_device_is_known(folder, engine):
    with init_inference(folder, **settings(**{"scheduler.max_num_batched_tokens": None})) as other:
        assert other.config.scheduler.max_num_batched_tokens == 2048
        assert tokens(other.generate(PROMPTS, GREEDY)) == tokens(engine.generate(PROMPTS, GREEDY))


def test_an_exception_inside_the_with_block_passes_through(folder):
    with pytest.raises(KeyError), init_inference(folder, **settings()) as engine:
        raise KeyError
    with pytest.raises(EngineDeadError):
        engine.stats()


def test_llm_accepts_vllms_names(folder, engine):
    with LLM(folder, **settings()) as llm:
        assert tokens(llm.generate(["hello"], GREEDY)) == tokens(engine.generate(["hello"], GREEDY))
        messages = [{"role": "user", "content": "hi"}]
        assert llm.chat(messages, GREEDY)[0].prompt == "[user]hi[a]"
        assert len(llm.chat([messages, messages], GREEDY)) == 2


# -- a model in memory ---------------------------------------------------------------------------------------------


def test_a_model_in_memory_gives_the_same(folder, engine, reference):
    with init_inference(reference, **settings()) as other:
        assert other.tokenizer is not None, "it lies beside the weights that the model was loaded from"
        assert tokens(other.generate(PROMPTS, GREEDY)) == tokens(engine.generate(PROMPTS, GREEDY))


def test_a_model_made_from_a_config_takes_token_ids_alone():
    from transformers import LlamaForCausalLM

    from tests.tiny import tiny_config

    with init_inference(LlamaForCausalLM(tiny_config()), **settings()) as engine:
        assert engine.tokenizer is None
        assert len(engine.generate([5, 6], GREEDY)) == 1
        with pytest.raises(RequestError, match=r"give token ids or set model\.tokenizer"):
            engine.generate("hello")


def test_a_tokenizer_that_is_named_but_missing_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer at"):
        init_inference(folder, **settings(**{"model.tokenizer": str(tmp_path / "none")}))


# -- the import ----------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_no_torch():
    code = (
        "import sys, ulysses_infer; "
        "print([name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
