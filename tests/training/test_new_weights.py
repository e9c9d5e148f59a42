"""`update_weights`, `sleep` and `wake_up` on engines of every kind of process."""

import pytest
import torch

from tests.equivalence.cases import ModeShuffle
from tests.equivalence.tiny_models import make_prompts, make_reference, perturb
from tests.tiny import settings, tiny_config, tiny_llama
from tests.training.training import with_adapters
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import CheckpointError, ConfigError, RequestError

PROMPTS = make_prompts(99)
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)


def generate(engine):
    return [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Three folders of one shape with other weights, transformers' models of them, and what those generate."""
    made = []
    for seed in range(3):
        path = tmp_path_factory.mktemp(f"weights{seed}")
        model = tiny_llama(path, tokenizer=False)
        perturb(model, seed=10 + seed)
        model.save_pretrained(path)
        made.append((path, model, make_reference(model, path, PROMPTS).tokens))
    return made


def tiny_llama_of(folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sources(others):
    """The second as a folder, the third as a state dict, the first as a model."""
    (_, first, _), (second, _, _), (_, third, _) = others
    return [str(second), third.state_dict(), first]


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_come_from_folders_state_dicts_and_models(others, ranks):
    expected = [tokens for _, _, tokens in others]
    with init_inference(others[0][0], **settings(ranks)) as engine:
        engine._engine.choose_mode = ModeShuffle(engine.config.parallel.available_modes)
        assert generate(engine) == generate(engine) == expected[0]
        for source, wanted in zip(sources(others), [expected[1], expected[2], expected[0]], strict=True):
            engine.update_weights(source)
            assert generate(engine) == generate(engine) == wanted


def test_a_model_that_was_given_in_memory_keeps_its_own_weights(others):
    (_, model, first), (folder, _, second), _ = others
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with init_inference(model, **settings()) as engine:
        assert generate(engine) == first
        engine.update_weights(folder)
        assert generate(engine) == second
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_model_with_lora_adapters_is_served_with_them_merged(others, ranks):
    (folder, _, plain), _, _ = others
    adapted = with_adapters(tiny_llama_of(folder), {"target_modules": ["q_proj", "up_proj"]})
    with init_inference(adapted, **settings(ranks)) as engine:
        blocks_per_group = generate(engine)
        for factor in (f for name, f in adapted.named_parameters() if "lora_B" in name):
            factor.data.mul_(-1)
        assert generate(engine) == blocks_per_group, "they are copies"
        engine.update_weights(adapted)
        with_second = generate(engine)
        with adapted.disable_adapter():
            engine.update_weights(adapted)
            assert generate(engine) == plain
    merged = adapted.merge_and_unload()
    assert with_second == make_reference(merged, folder, PROMPTS).tokens
    assert blocks_per_group != with_second != plain


def test_cached_prefixes_of_other_weights_are_not_read(others):
    (folder, _, _), (second, _, _), _ = others
    prompt = [[*range(5, 40)]]
    with init_inference(folder, **settings()) as engine:
        hits = []
        for source in (None, None, second, second):
            if len(hits) == 2:
                engine.update_weights(source)
            engine.generate(prompt, GREEDY)
            hits.append(engine.stats()["prefix_cache_hits"])
    assert hits[1] > hits[0] == 0
    assert hits[2] == hits[1], "the first prompt after the update found nothing"
    assert hits[3] > hits[2]


def refusals(folder, others):
    """What each bad source is refused with, and what the engine generates afterwards."""
    state = dict(others[1][1].state_dict())
    first = "model.layers.0.mlp.down_proj.weight"
    lacking = {name: tensor for name, tensor in state.items() if name != "model.norm.weight"}
    seen = []
    with init_inference(folder, **settings(2)) as engine:
        before = generate(engine)
        for bad in ({**state, first: state[first][:, :-8]}, lacking, "/no/such/folder", 3):
            with pytest.raises((CheckpointError, ConfigError)) as caught:
                engine.update_weights(bad)
            seen.append(str(caught.value))
            assert generate(engine) == before, "nothing was written"
        engine.update_weights(state)
        assert generate(engine) != before
    return seen


def check_refusals(seen):
    assert "has shape [64, 80], but the model's config makes it [64, 88]" in seen[0]
    assert "lacks 1 of" in seen[1]
    assert "is neither a folder" in seen[2]
    assert "model is a int" in seen[3]


def test_a_source_that_does_not_fit_is_refused_before_anything_is_written(others):
    check_refusals(refusals(str(others[0][0]), others))


@pytest.mark.distributed
def test_a_source_that_does_not_fit_is_refused_on_every_rank(others, rank_pool):
    first, second = rank_pool(2).run(refusals, str(others[0][0]), others)
    assert first == second
    check_refusals(first)


def one_rank_has_another(folder, others):
    import os

    source = others[1][1].state_dict()
    if os.environ["RANK"] == "1":  # a divergence that users can make
        source = {name: tensor[:-1] for name, tensor in source.items()}
    with init_inference(folder, **settings(2)) as engine:
        before = generate(engine)
        with pytest.raises(CheckpointError) as caught:
            engine.update_weights(source)
        assert generate(engine) == before
    return str(caught.value)


@pytest.mark.distributed
def test_weights_that_one_rank_refuses_are_taken_by_none(others, rank_pool):
    first, second = rank_pool(2).run(one_rank_has_another, str(others[0][0]), others)
    assert first == second


def test_weights_do_not_change_and_memory_is_not_given_back_under_a_running_request(others):
    with init_inference(others[0][0], **settings()) as engine:
        stream = engine.stream(PROMPTS[3], GREEDY)
        next(stream)
        for call in (lambda: engine.update_weights(others[1][0]), engine.sleep):
            with pytest.raises(RequestError, match="1 requests are running and 0 waiting; let them end"):
                call()
        *_, last = stream
        assert last.outputs[0].token_ids == others[0][2][3]
        engine.update_weights(others[1][0])
        assert generate(engine) == others[1][2]


# -- sleep -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_an_engine_sleeps_and_wakes_up_as_it_was(others, ranks):
    folder, _, expected = others[0]
    with init_inference(folder, **settings(ranks)) as engine:
        engine.wake_up()
        assert generate(engine) == expected
        for _ in range(2):
            engine.sleep()
            engine.sleep()
            with pytest.raises(RequestError, match=r"asleep; call wake_up\(\) first"):
                engine.generate("a")
            with pytest.raises(RequestError, match="asleep"):
                next(engine.stream("a"))
            with pytest.raises(RequestError, match="asleep"):
                engine.calibrate(1)
            assert engine.stats()["num_requests_waiting"] == 0
            engine.wake_up()
            assert generate(engine) == generate(engine) == expected


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("update_first", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_weights_dropped_by_a_deep_sleep_come_with_the_next_update(others, ranks, update_first):
    (folder, _, _), (second, _, expected), _ = others
    with init_inference(folder, **settings(ranks)) as engine:
        generate(engine)
        engine.sleep(level=2)
        if not update_first:
            engine.wake_up()
            with pytest.raises(RequestError, match=r"sleep\(level=2\); call update_weights\(\) first"):
                engine.generate([5])
        engine.update_weights(second)
        if update_first:
            with pytest.raises(RequestError, match="asleep"):
                engine.generate([5])
            engine.wake_up()
        assert generate(engine) == expected


def test_a_deep_sleep_leaves_a_model_in_memory_alone(others):
    _, model, expected = others[0]
    with init_inference(model, **settings()) as engine:
        engine.sleep(level=2)
        engine.update_weights(model)
        engine.wake_up()
        assert generate(engine) == expected


@pytest.mark.parametrize("level", [0, 3, "deep"])
def test_an_unknown_level_is_refused(others, level):
    with init_inference(others[0][0], **settings()) as engine:
        with pytest.raises(RequestError, match=r"use 1 .* or 2"):
            engine.sleep(level)
        assert generate(engine) == others[0][2]


def resident_bytes():
    import os

    import psutil

    return psutil.Process(os.getpid()).memory_info().rss


def measure_sleep(folder, cache_bytes):
    """Resident bytes of this rank: awake with a full cache, asleep, deep asleep, awake and full again."""
    import gc

    from ulysses_infer.worker.memory import return_freed_memory

    changes = {"cache.num_blocks": None, "cache.memory_bytes": cache_bytes, "cache.block_size": 16}
    with init_inference(folder, **settings(2, **changes)) as engine:
        cache = engine._rank.worker.cache
        found = []

        def fill():
            for tensor in (*cache.keys, *cache.values):
                tensor.fill_(1)
            gc.collect()
            return_freed_memory()  # what earlier tests have left in the heap of this rank is not the engine's
            found.append(resident_bytes())

        fill()
        for level in (1, 2):
            engine.sleep(level)
            gc.collect()
            found.append(resident_bytes())
        engine.update_weights(folder)
        engine.wake_up()
        fill()
    return found, sum(engine_bytes(folder))


def engine_bytes(folder):
    from pathlib import Path

    return [path.stat().st_size for path in Path(folder).glob("*.safetensors")]


@pytest.mark.distributed
def test_sleep_really_gives_the_memory_back(rank_pool, tmp_path):
    from transformers import LlamaForCausalLM

    config = tiny_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    cache_bytes = 64 << 20
    for (awake, asleep, deep, again), weight_bytes in rank_pool(2).run(measure_sleep, str(tmp_path), cache_bytes):
        assert awake - asleep > 0.9 * cache_bytes
        assert asleep - deep > 0.5 * weight_bytes
        assert abs(again - awake) < 0.3 * cache_bytes
