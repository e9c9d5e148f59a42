"""Heads that draft from hidden states: their drafts are those of the published description, and change no output."""

import json
import random
import shutil
from pathlib import Path

import hypothesis
import pytest

from tests.distributed.draft_heads import eagle3_checkpoint, frequent_model, mtp_checkpoint, other_format
from tests.distributed.test_speculation_modes import REPEATING, batches, check, complete
from tests.model.quantization.checkpoints import FORMATS
from tests.tiny import SHAPE, settings, tiny_config, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import ConfigError, UlyssesError

pytestmark = pytest.mark.distributed
TEXTS = ["hello abc", "the quick brown fox and the lazy dog, all of them here", "zz", "the quick brown fox and"]
FAMILIES = ["qwen2", "deepseek_v3", "glm4_moe", "qwen3_next"]


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """(folder, recipe, head in plain torch) of a kind of head; made once."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            chosen = {"speculation.method": "eagle3" if kind == "eagle3" else "mtp"}
            if kind == "eagle3":
                head = eagle3_checkpoint(frequent_model(tiny_config(num_hidden_layers=5), folder), folder / "head")
                chosen["speculation.model"] = str(folder / "head")
            else:
                head = mtp_checkpoint(kind, folder)
            made[kind] = str(folder), chosen, head
        return made[kind]

    return make


def recorded(engine):
    """Collects what the engine's head proposes: (text, drafts)."""
    proposer, found = engine.speculation._proposer, []
    propose = proposer.propose

    def observed(queries):
        drafts = propose(queries)
        for query, draft in zip(queries, drafts, strict=True):
            found.append((query.request.token_ids_from(0, query.request.num_tokens), list(draft.tokens)))
        return drafts

    proposer.propose = observed
    return found


def run(folder, chosen, ranks, num_tokens, options=None):
    """(outputs without drafts, with drafts, accepted tokens, what was proposed), modes flipped at random. With few
    blocks and small steps, so that prompts are cut, share prefixes and are preempted."""
    changes = {"speculation.num_tokens": num_tokens, "cache.num_blocks": 40, "scheduler.max_num_batched_tokens": 12}
    options = options or [{}] * len(TEXTS)
    with init_inference(folder, **settings(*ranks, **chosen, **changes)) as engine:
        draw, modes, found = random.Random(0), engine.config.parallel.available_modes, []
        if engine.is_first:
            engine._engine.choose_mode = lambda _: draw.choice(modes)
            found = recorded(engine._engine)
        outputs = []
        for drafts in (False, True):
            params = [
                SamplingParams(
                    **{"max_tokens": 16, "ignore_eos": True, "temperature": 0, **each, "speculation": drafts}
                )
                for each in options
            ]
            outputs.append([each.outputs[0].token_ids for each in engine.generate(TEXTS, params)])
        accepted = engine.stats()["spec_decode_num_accepted_tokens"]
        if engine.is_first:
            assert engine._engine.scheduler.allocator.num_used == 0
    return *outputs, accepted, found


def mixed_options():
    return [{}, {"temperature": 0.7, "seed": 1}, {"temperature": 1.0, "seed": 2, "top_k": 9}, {"logprobs": 1}]


def check_drafts(found, head, at_least=10):
    """Every proposal is what the reference drafts after the same text."""
    wanted = [(text, drafts) for text, drafts in found if drafts]
    assert len(wanted) >= at_least
    for text, drafts in wanted:
        assert drafts == head.drafts(text, len(drafts))


@pytest.mark.parametrize("kind", [pytest.param("qwen2", marks=pytest.mark.thorough), "eagle3"])
def test_drafts_are_those_of_the_description_and_outputs_are_equal(heads, kind):
    folder, chosen, head = heads(kind)
    without, with_drafts, _, found = run(folder, chosen, (1, 1), 3)
    assert with_drafts == without
    check_drafts(found, head)


def cases():
    for kind in [*FAMILIES, "eagle3"]:
        for number, ranks in enumerate([(1, 1), (2, 1), (1, 2)]):
            is_default = (kind, ranks) in (("qwen2", (2, 1)),)
            marks = [] if is_default else [pytest.mark.thorough]
            yield pytest.param(kind, ranks, 1 + (number + len(kind)) % 4, id=f"{kind}-{ranks}", marks=marks)
    yield pytest.param("eagle3", (2, 2), 2, id="eagle3-(2, 2)", marks=pytest.mark.thorough)


@pytest.mark.parametrize(("kind", "ranks", "num_tokens"), [*cases()])
def test_heads_run_in_every_mode(heads, rank_pool, kind, ranks, num_tokens):
    folder, chosen, head = heads(kind)
    results = rank_pool(ranks[0] * ranks[1]).run(run, folder, chosen, ranks, num_tokens, mixed_options())
    for without, with_drafts, accepted, _ in results:
        assert with_drafts == without
        assert accepted > 0
    check_drafts(results[0][3], head)


@pytest.mark.thorough
def test_num_tokens_auto_drafts_with_the_time_of_drafting_in_mind(heads):
    folder, chosen, head = heads("qwen2")
    without, with_drafts, _, found = run(folder, chosen, (1, 1), "auto", mixed_options())
    assert with_drafts == without
    check_drafts(found, head, at_least=0)  # how many are drafted depends on measured times


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["qwen2", "eagle3"])
def test_hidden_states_are_those_of_transformers_layer_loop_too(heads, kind):
    folder, chosen, head = heads(kind)
    without, with_drafts, _, found = run(folder, {**chosen, "runtime.fuse": False}, (1, 1), 2)
    assert with_drafts == without
    check_drafts(found, head)


@pytest.mark.thorough
def test_heads_of_another_publisher_are_read(heads, tmp_path):
    folder, chosen, head = heads("eagle3")
    other = other_format(head, tmp_path, Path(chosen["speculation.model"]))
    without, with_drafts, _, found = run(folder, {**chosen, "speculation.model": str(tmp_path)}, (1, 1), 3)
    assert with_drafts == without
    check_drafts(found, other)


@pytest.fixture(scope="module")
def started(heads):
    folder, chosen, _ = heads("qwen2")
    changes = {"speculation.num_tokens": 3, "cache.num_blocks": 45, "scheduler.max_num_batched_tokens": 24}
    with init_inference(folder, **settings(1, **chosen, **changes)) as engine:
        yield engine


@pytest.mark.thorough
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(batch=batches)
def test_any_options_give_the_outputs_without(started, batch):
    check(started._engine, batch)


@pytest.mark.thorough
def test_aborts_return_all_blocks(started):
    source = random.Random(1)
    for _ in range(20):
        complete(started._engine, REPEATING, True, abort=source)


@pytest.mark.thorough
def test_a_cache_that_was_freed_is_filled_again(started, heads):
    engine = started._engine
    head, found = heads("qwen2")[2], recorded(engine)
    batch = [(text, {"max_tokens": 12, "temperature": 0, "ignore_eos": True}) for text in TEXTS]
    before = complete(engine, batch, True)
    started.sleep()
    started.wake_up()
    found.clear()
    after = complete(engine, batch, True)
    assert [each.outputs[0].token_ids for each in after] == [each.outputs[0].token_ids for each in before]
    check_drafts(found, head)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["fp8-block", "awq"])
def test_a_quantised_module_drafts_as_its_dense_weights(tmp_path, name):
    head = mtp_checkpoint("qwen2", tmp_path, chosen=FORMATS[name])
    without, with_drafts, _, found = run(str(tmp_path), {"speculation.method": "mtp"}, (1, 1), 2)
    assert with_drafts == without
    check_drafts(found, head)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
def test_modules_are_quantised_with_the_model(heads, kind):
    folder, chosen, _ = heads(kind)
    without, with_drafts, accepted, _ = run(folder, {**chosen, "model.quantize": "int8"}, (1, 1), 2)
    assert with_drafts == without
    assert accepted > 0


def refusal(folder, **chosen):
    with pytest.raises(UlyssesError) as refused:
        init_inference(str(folder), **settings(1, **chosen))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_checkpoint_without_a_module_is_refused(tmp_path):
    tiny_llama(tmp_path)
    message = refusal(tmp_path, **{"speculation.method": "mtp"})
    assert "(model type 'llama') has no multi-token-prediction module" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_hidden_size": 48}, "hidden size 48, but the served model's is 64"),
        ({"vocab_size": 128}, f"vocabulary size 128, but the served model's is {SHAPE['vocab_size']}"),
        ({"architectures": ["LlamaForCausalLM"]}, "is no EAGLE-3 head: its architecture is LlamaForCausalLM"),
        ({"num_hidden_layers": 2}, "only EAGLE-3 heads with one layer"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}}, "the served model has 5 layers"),
    ],
)
def test_a_head_of_another_model_is_refused(heads, tmp_path, changes, message):
    folder, chosen, _ = heads("eagle3")
    own = Path(chosen["speculation.model"])
    values = json.loads((own / "config.json").read_text()) | changes
    shutil.copy(own / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert message in refusal(folder, **{**chosen, "speculation.model": str(tmp_path)})


def test_eagle3_without_a_head_is_refused(heads):
    with pytest.raises(ConfigError, match="needs a head"):
        init_inference(heads("eagle3")[0], **settings(1, **{"speculation.method": "eagle3"}))
