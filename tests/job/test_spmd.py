"""One engine that every rank calls alike, as under a launcher: equal results and equal errors in every mode."""

import random

import pytest

from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import CheckpointError, ConfigError, EngineDeadError, RequestError, UlyssesError

pytestmark = pytest.mark.distributed
PROMPTS = ["hello", [5, 6, 7, 8, 9], "a", "the quick brown fox jumps over the lazy dog"]


def summary(outputs):
    return [
        (o.request_id, o.prompt, [(c.text, c.token_ids, c.finish_reason, c.logprobs) for c in o.outputs])
        for o in outputs
    ]


def seeded(count):
    return [SamplingParams(temperature=1.0, max_tokens=12, seed=seed, ignore_eos=True) for seed in range(count)]


def generate(folder, sp, tp, prompts, params):
    """The tokens with only sequence parallelism, with only tensor parallelism, and with modes chosen at random."""
    chosen, found = random.Random(1), []
    with init_inference(folder, **settings(sp, tp, **{"cache.enable_prefix_caching": False})) as engine:
        for mode in ("sp", "tp", "random"):
            if mode != "random":
                engine.set_policy("static", mode=mode)
            elif engine.is_first:
                engine._engine.choose_mode = lambda _: chosen.choice(engine.config.parallel.available_modes)
            found.append([output.outputs[0].token_ids for output in engine.generate(prompts, params)])
        assert len(engine.stats()["modes"]) == len(engine.config.parallel.available_modes)
    return found


def test_a_seed_gives_the_same_tokens_in_every_mode_and_layout(folder, rank_pool):
    found = []
    for sp, tp in ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2)):
        results = rank_pool(sp * tp).run(generate, folder, sp, tp, PROMPTS, seeded(4))
        assert all(result == results[0] for result in results)
        found += results[0]
    assert all(tokens == found[0] for tokens in found)
    assert len({tuple(tokens) for tokens in found[0]}) == 4


def everything(folder):
    """Every public call on each rank; returns all results."""
    seen = []
    with init_inference(folder, **settings(2)) as engine:
        params = SamplingParams(n=2, temperature=1.0, max_tokens=6, seed=1, logprobs=1, prompt_logprobs=0)
        seen.append(summary(engine.generate(PROMPTS, params)))
        seen.append(summary(engine.generate(PROMPTS, seeded(4), arrival_steps=[0, 5, 1, 2])))
        seen.append(summary(engine.stream("hello", seeded(1)[0])))
        for output in engine.stream("hello", seeded(1)[0]):
            if len(output.outputs[0].token_ids) == 3:
                break
        seen.append(summary([output]))
        del output
        seen.append(engine.stats()["num_requests_running"])
        turns = zip(engine.stream("hello", seeded(1)[0]), engine.stream("a", seeded(1)[0]), strict=True)
        seen.append([summary(pair) for pair in turns])
        for output in engine.stream("hello", seeded(1)[0]):
            if len(output.outputs[0].token_ids) == 2 and not output.finished:
                seen.append(summary([engine.abort(output.request_id)]))
        seen.append(summary([output]))
        engine.set_policy("static", mode="tp")
        engine.generate("a")
        stats = engine.stats()
        seen.append([stats["policy"], stats["weight_bytes_per_rank"], stats["cache_bytes_per_rank"], stats["switches"]])
        idle = engine.stats()
        assert (idle["num_requests_running"], idle["kv_cache_usage_perc"]) == (0, 0)
        if engine.is_first:
            engine._engine.scheduler.allocator.assert_idle()
            assert len(engine._rank.worker.tables) <= 1 + len(engine._engine.requests._forgotten)
    return seen


def test_every_call_gives_every_rank_the_same(folder, rank_pool):
    first, second = rank_pool(2).run(everything, folder)
    assert len(first) == 9
    assert first == second


def refusals(folder):
    """Errors of every kind, one after another, on an engine that survives them."""
    seen = []
    with init_inference(folder, **settings(2)) as engine:
        for call in (
            lambda: engine.generate(["hello", ""]),
            lambda: engine.generate([99]),
            lambda: engine.generate("hello", {"temperature": 0}),
            lambda: engine.generate("hello", [SamplingParams()] * 2),
            lambda: engine.generate(["hello", [1, 10**9]], arrival_steps=[0, 9]),
            lambda: next(engine.stream("")),
            lambda: engine.set_policy("statik"),
            lambda: engine.set_policy("static", mode=[3, 1]),
        ):
            with pytest.raises(UlyssesError) as caught:
                call()
            seen.append((type(caught.value), str(caught.value)))
            seen.append(summary(engine.generate("hello", SamplingParams(temperature=0, max_tokens=2))))
    return seen


def test_every_rank_raises_the_same_and_the_engine_goes_on(folder, rank_pool):
    first, second = rank_pool(2).run(refusals, folder)
    assert first == second
    errors = first[::2]
    assert [kind for kind, _ in errors] == [RequestError] * 6 + [ConfigError] * 2
    assert all("\n" not in message for _, message in errors)


def failed_start(path, sp, changes):
    with pytest.raises(UlyssesError) as caught:
        init_inference(path, **settings(sp, **changes))
    return type(caught.value), str(caught.value)


def test_a_bad_checkpoint_is_the_same_error_on_every_rank(rank_pool, tmp_path):
    for results in (
        rank_pool(2).run(failed_start, str(tmp_path / "missing"), 2, {}),
        rank_pool(2).run(failed_start, str(tmp_path), 2, {}),
    ):
        assert results[0] == results[1]
        assert results[0][0] is CheckpointError


def fail_alone(folder, phase):
    """Rank 1 alone fails in one phase of the start; what each rank raises, and that a second start works."""
    import os

    from ulysses_infer.job import load_model, make_worker
    from ulysses_infer.model.model import ModelBuilder

    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            holder, name, error = {
                "budget": (load_model, "available_memory", ConfigError("rank 1 has no memory")),
                "load": (ModelBuilder, "load", CheckpointError("rank 1 cannot read")),
                "cache": (make_worker, "PagedCache", RuntimeError("rank 1 is out of memory\nmore lines")),
                "blueprint": (load_model, "make_blueprint", KeyError("rank 1 has a bug")),
            }[phase]

            def fail(*args, **kwargs):
                raise error

            patch.setattr(holder, name, fail)
        with pytest.raises(UlyssesError) as caught:
            init_inference(folder, **settings(2))
    with init_inference(folder, **settings(2)) as engine:
        count = len(engine.generate("hello", SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids)
    return str(caught.value), count


@pytest.mark.parametrize("phase", ["blueprint", "budget", "load", "cache"])
def test_an_error_of_one_rank_at_start_is_raised_on_all(folder, rank_pool, phase):
    for message, count in rank_pool(2).run(fail_alone, folder, phase):
        assert "rank 1" in message
        assert "\n" not in message
        assert count == 2


def fail_in_a_step(folder, loser):
    """One rank raises in the middle of a generation."""
    import os
    import time

    # Layer by layer: a step from a graph calls no layer that could raise.
    engine = init_inference(folder, **settings(2, **{"runtime.enforce_eager": True}))
    engine.generate("hello")
    if int(os.environ["RANK"]) == loser:
        forward, calls = engine._rank.worker.model.forward, []

        def fail(*args):
            calls.append(None)
            if len(calls) == 3:
                raise RuntimeError("CUDA out of memory, or so\nmore lines")
            return forward(*args)

        engine._rank.worker.model.forward = fail
    started = time.monotonic()
    with pytest.raises(EngineDeadError) as caught:
        engine.generate("hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    seconds = time.monotonic() - started
    message = str(caught.value)
    with pytest.raises(EngineDeadError, match="shut down"):
        engine.generate("hello")
    del caught
    return message, seconds


@pytest.mark.parametrize("loser", [0, 1])
def test_a_rank_that_raises_in_a_step_ends_the_engine_on_all(folder, rank_pool, loser):
    results = rank_pool(2).run(fail_in_a_step, folder, loser)
    assert "CUDA out of memory" in results[loser][0]
    assert "another rank was lost" in results[1 - loser][0]
    assert all("\n" not in message and seconds < 10 for message, seconds in results)


def start_twice(folder):
    """Engines one after the other, of several layouts, on the same ranks."""
    found = []
    for sp, tp in ((2, 1), (1, 2), (2, 1)):
        with init_inference(folder, **settings(sp, tp)) as engine:
            found.append([o.outputs[0].token_ids for o in engine.generate(PROMPTS, seeded(4))])
    return found


def test_engines_may_follow_each_other_on_the_same_ranks(folder, rank_pool):
    for found in rank_pool(2).run(start_twice, folder):
        assert found[0] == found[1] == found[2]


def of_memory(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for source in (model, folder):
        with init_inference(source, **settings(2)) as engine:
            found.append([o.outputs[0].token_ids for o in engine.generate(PROMPTS, seeded(4))])
    return found


def test_every_rank_may_bring_the_model_in_memory(folder, rank_pool):
    for from_memory, from_folder in rank_pool(2).run(of_memory, folder):
        assert from_memory == from_folder
