"""Speculation changes no output of models with windows, chunks, sinks, latents, selected keys, entries and states."""

import random

import pytest

from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.test_compressed_keys import make_compressed
from tests.equivalence.tiny_models import VOCABULARY, make_checkpoint
from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import ConfigError

pytestmark = pytest.mark.distributed
FAMILIES = [
    "gemma3_text",
    "deepseek_v3",
    "llama4_text",
    "gpt_oss",
    "deepseek_v32",
    "qwen3_moe",
    "gemma4_text",
    "deepseek_v4",
]
RECURRENT = [
    "qwen3_next",
    "mamba2",
    "lfm2",
    "rwkv",
    "zaya",
    "inkling_text",
    "qwen4_exp_text",
    "recurrent_gemma",
    "kimi_linear",
    "minimax",
    "jamba",
    "xlstm",
]
SETTINGS = {"model.max_model_len": 96, "cache.num_blocks": 48, "speculation.method": "ngram"}


def prompts():
    """Texts of which the most recent part occurs before."""
    generator = random.Random(0)
    parts = [[generator.randrange(3, VOCABULARY) for _ in range(length)] for length in (3, 5, 9, 2)]
    return [part * 3 + part[:1] for part in parts]


def outputs_and_accepted(folder, sp, tp, **changes):
    """(outputs without drafts, with drafts, number of accepted tokens) in modes that flip."""
    # rewards for repetition make even a random model repeat itself
    params = [
        SamplingParams(temperature=0.5 * (n % 2), seed=n, max_tokens=30, ignore_eos=True, frequency_penalty=-2)
        for n in range(4)
    ]
    chosen = settings(sp, tp, **SETTINGS, **{"speculation.num_tokens": 4, **changes})
    with init_inference(folder, **chosen) as engine:
        draw, available = random.Random(0), engine.config.parallel.available_modes
        if engine.is_first:
            engine._engine.choose_mode = lambda _: draw.choice(available)
        found = []
        for drafts in (False, True):
            wanted = [each.clone(speculation=drafts) for each in params]
            found.append([output.outputs[0].token_ids for output in engine.generate(prompts(), wanted)])
        return *found, engine.stats()["spec_decode_num_accepted_tokens"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        if family == "deepseek_v4":
            make_compressed("short and long", folder)
        else:
            make_checkpoint(next(iter(tiny_configs(family))), folder)
        return str(folder)

    return make


def cases():
    for number, family in enumerate(FAMILIES):
        for sp, tp in ((1, 1), (2, 1), (1, 2)):
            marks = [] if (sp, tp) == (1, 1) and number < 2 else [pytest.mark.thorough]
            yield pytest.param(family, sp, tp, id=f"{family}-sp{sp}xtp{tp}", marks=marks)
    for number, family in enumerate(RECURRENT):
        sp, tp = ((2, 1), (1, 2), (4, 1), (2, 2), (1, 1))[number % 5]
        marks = [] if number == 0 else [pytest.mark.thorough]
        yield pytest.param(family, sp, tp, id=f"{family}-sp{sp}xtp{tp}", marks=marks)


@pytest.mark.parametrize(("family", "sp", "tp"), [*cases()])
def test_every_kind_of_cache_gives_the_outputs_without(checkpoint, rank_pool, family, sp, tp):
    for without, with_drafts, accepted in rank_pool(sp * tp).run(outputs_and_accepted, checkpoint(family), sp, tp):
        assert with_drafts == without
        assert accepted > 5


@pytest.mark.thorough
@pytest.mark.parametrize("changes", [{"cache.enable_prefix_caching": False}, {"cache.state_snapshots": 1}], ids=str)
def test_states_before_drafts_take_the_slots_that_there_are(checkpoint, changes):
    without, with_drafts, accepted = outputs_and_accepted(checkpoint("lfm2"), 1, 1, **changes)
    assert with_drafts == without
    assert accepted > 5


def test_recurrent_layers_without_a_slot_for_the_states_before_drafts_are_refused(checkpoint):
    with pytest.raises(ConfigError) as refusal:
        init_inference(checkpoint("lfm2"), **settings(1, **SETTINGS, **{"cache.state_snapshots": 0}))
    assert str(refusal.value) == (
        "speculation.method = 'ngram': model type 'lfm2' has recurrent layers, and there is no slot for their states "
        "before drafted tokens; raise cache.state_snapshots or cache.memory_bytes, or use none"
    )
