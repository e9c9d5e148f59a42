"""Speculation changes no output of requests with LoRA adapters and any options, in every layout and modes that flip."""

import random

import hypothesis
import peft
import pytest
from hypothesis import strategies as st

from tests.distributed.drafted_requests import assert_equal, batches
from tests.tiny import settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference

pytestmark = pytest.mark.distributed
ADAPTERS = {"one": ["q_proj", "v_proj", "down_proj"], "two": ["k_proj", "o_proj", "gate_proj", "up_proj"]}
SETTINGS = {"cache.num_blocks": 45, "scheduler.max_num_batched_tokens": 24, "speculation.method": "suffix"}
LAYOUTS = [(2, 1), (4, 1), (2, 2), (1, 4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(model, adapters by name)."""
    root = tmp_path_factory.mktemp("adapted")
    model = tiny_llama(root / "model")
    made = {}
    for name, modules in ADAPTERS.items():
        chosen = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=4, target_modules=modules)
        made[name] = str(root / name)
        wrapped = peft.get_peft_model(model, chosen)
        wrapped.save_pretrained(made[name])
        model = wrapped.unload()
    return str(root / "model"), made


def outputs_of(folder, adapters, sp, tp, rounds):
    """[(without drafts, with drafts) per round], and the number of accepted tokens."""
    with init_inference(folder, **settings(sp, tp, **SETTINGS, **{"lora.adapters": adapters})) as engine:
        draw, modes = random.Random(0), engine.config.parallel.available_modes
        if engine.is_first:
            engine._engine.choose_mode = lambda _: draw.choice(modes)
        found = []
        for batch in rounds:
            texts, wanted, names = zip(*[(text, options, name) for (text, options), name in batch], strict=True)
            params = [[SamplingParams(**each, speculation=drafts) for each in wanted] for drafts in (False, True)]
            found.append([engine.generate(list(texts), each, adapter=list(names)) for each in params])
        return found, engine.stats()["spec_decode_num_accepted_tokens"]


def check(rank_pool, folders, sp, tp, rounds):
    repeating = ("abcabcabcabcabc", {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "frequency_penalty": -2})
    rounds = [*rounds, [(repeating, None), (repeating, "one"), (repeating, "two")]]
    for found, accepted in rank_pool(sp * tp).run(outputs_of, *folders, sp, tp, rounds, timeout=400.0):
        for without, with_drafts in found:
            for expected, output in zip(without, with_drafts, strict=True):
                assert_equal(output, expected)
        assert accepted > 0


def named(batch):
    """Each request of a batch with an adapter, or None."""
    return st.tuples(*[st.tuples(st.just(each), st.sampled_from([None, *ADAPTERS])) for each in batch]).map(list)


rounds_of_requests = st.lists(batches.flatmap(named), min_size=2, max_size=2)


@hypothesis.settings(max_examples=1, deadline=None)
@hypothesis.given(rounds=rounds_of_requests)
def test_adapters_and_options_give_the_outputs_without(rank_pool, folders, rounds):
    check(rank_pool, folders, 1, 1, rounds)


@pytest.mark.thorough
@pytest.mark.parametrize(("sp", "tp"), LAYOUTS)
@hypothesis.settings(max_examples=4, deadline=None)
@hypothesis.given(rounds=rounds_of_requests)
def test_every_layout_gives_the_outputs_without(rank_pool, folders, sp, tp, rounds):
    check(rank_pool, folders, sp, tp, rounds)
