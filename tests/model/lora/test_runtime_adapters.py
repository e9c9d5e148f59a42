"""LoRA adapters that are loaded, replaced and unloaded while the engine serves."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.model.lora.test_adapters import NEW_TOKENS, adapted, check, params  # noqa: F401
from tests.tiny import settings
from ulysses_infer import init_inference
from ulysses_infer.errors import CheckpointError, ConfigError, RequestError
from ulysses_infer.model.lora.table import ServedAdapters

ROOM = {"lora.runtime_bytes": 1 << 20}


def answers_of(engine, prompts, adapters):
    """As `check` reads them."""
    work = [(prompt, adapter) for prompt in prompts for adapter in adapters]
    outputs = engine.generate([p for p, _ in work], params(), adapter=[a for _, a in work])
    first = [output.outputs[0] for output in outputs]
    return [(o.token_ids, [next(iter(entry.values())).logprob for entry in o.logprobs]) for o in first]


def load_as_it_runs(folder, folders, prompts, sp, tp):
    """What adapters answer after they were loaded, in the order of `check`; then what their names answer, swapped."""
    with init_inference(folder, **settings(sp, tp, **ROOM)) as engine:
        modes = iter(engine.config.parallel.available_modes * 1000)
        if engine.is_first:
            engine._engine.choose_mode = lambda _: next(modes)
        engine.load_adapter("wide", folders["wide"])
        engine.generate(prompts[:1], params(), adapter="wide")
        engine.load_adapter("narrow", folders["narrow"])
        found = answers_of(engine, prompts, [None, "wide", "narrow"])
        engine.unload_adapter("wide")
        with pytest.raises(RequestError, match="adapter 'wide' is not loaded; loaded are: narrow"):
            engine.generate(prompts[:1], params(), adapter="wide")
        engine.load_adapter("wide", folders["narrow"])
        engine.load_adapter("narrow", folders["wide"], replace=True)
        return found, answers_of(engine, prompts, [None, "narrow", "wide"])


@pytest.mark.distributed
@pytest.mark.parametrize(("sp", "tp"), [(2, 1), pytest.param(2, 2, marks=pytest.mark.thorough)])
def test_loaded_adapters_answer_as_pefts_and_names_can_be_given_again(adapted, rank_pool, sp, tp):  # noqa: F811
    folder, folders, answers = adapted
    prompts = answers[None].prompts
    for found, swapped in rank_pool(sp * tp).run(load_as_it_runs, folder, folders, prompts, sp, tp):
        check(found, prompts, answers)
        check(swapped, prompts, answers)


def test_running_requests_keep_the_adapter_they_began_with(adapted):  # noqa: F811
    folder, folders, answers = adapted
    prompt = answers[None].prompts[0]
    with init_inference(folder, **settings(**ROOM)) as engine:
        engine.load_adapter("a", folders["wide"])
        stream = engine.stream(prompt, params(), adapter="a")
        next(stream)
        engine.load_adapter("a", folders["narrow"], replace=True)
        other = engine.stream(prompt, params(), adapter="a")
        next(other)
        engine.unload_adapter("a")
        last, of_new = list(stream)[-1], list(other)[-1]
        assert last.outputs[0].token_ids == answers["wide"].tokens[0]
        assert of_new.outputs[0].token_ids == answers["narrow"].tokens[0]
        assert engine._engine.requests.take_unused_adapters() == [1, 2]


def test_adapters_that_do_not_fit_are_refused_and_nothing_changes(adapted, tmp_path):  # noqa: F811
    folder, folders, answers = adapted
    size = (Path(folders["wide"]) / "adapter_model.safetensors").stat().st_size
    with init_inference(folder, **settings(**{"lora.runtime_bytes": size + 9})) as engine:
        with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
            engine.load_adapter("broken", str(tmp_path))
        engine.load_adapter("a", folders["wide"])
        with pytest.raises(RequestError, match=r"takes \d+ bytes, and 9 of lora.runtime_bytes = \d+ are left"):
            engine.load_adapter("b", folders["narrow"])
        with pytest.raises(RequestError, match="an adapter 'a' is loaded"):
            engine.load_adapter("a", folders["narrow"])
        with pytest.raises(RequestError, match="the model's own name"):
            engine.load_adapter(engine.config.served_model_name, folders["narrow"])
        assert (
            engine.generate([answers[None].prompts[0]], params(), adapter="a")[0].outputs[0].token_ids
            == (answers["wide"].tokens[0])
        )
    with init_inference(folder, **settings()) as engine, pytest.raises(RequestError, match="runtime_bytes above 0"):
        engine.load_adapter("a", folders["wide"])
    with pytest.raises(ConfigError, match=r"cache.latent = true: adapters may change"):
        init_inference(folder, **settings(**{**ROOM, "cache.latent": True}))


names = st.sampled_from(["a", "b", "c"])


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "run", "end", "drop"]), names), max_size=30))
def test_a_number_belongs_to_one_adapter_and_is_dropped_once_and_only_when_unused(actions):
    table = ServedAdapters(["a"], runtime_bytes=10**6)
    owners, running, dropped = {1: "a"}, [], set()
    for action, name in actions:
        if action == "add":
            number = table.next_number(name, 1, replace=True)
            assert number not in owners
            owners[number] = name
            table.add(name, 1)
        elif action == "remove" and name in table.names:
            table.remove(name)
        elif action == "run" and name in table.names:
            running.append(table.number(name))
        elif action == "end" and running:
            running.pop()
        elif action == "drop":
            unused = set(table.take_unused(set(running)))
            assert not unused & (dropped | set(running) | {table.number(each) for each in table.names})
            dropped |= unused
    assert {owners[table.number(name)] for name in table.names} == set(table.names)
