"""The engine serves what DeepSpeed is training, on the ranks that train, and keeps up with it between steps."""

from unittest import mock

import pytest
import torch

from tests.equivalence.cases import ModeShuffle, all_logprobs
from tests.equivalence.tiny_models import token_logprobs
from tests.selection import diagonal
from tests.tiny import settings
from tests.training.training import training
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import ConfigError

pytestmark = pytest.mark.distributed
PROMPTS = [[5], [7, 8, 9, 10, 11], [3] * 17]
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=0, logprobs=0)
PLAIN = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
NO_LAYOUT = {name: value for name, value in settings().items() if not name.startswith("parallel.")}
BASES = {"as trained": {}, "tp": {"parallel.sp": 1, "parallel.tp": 2}, "sp4": {"parallel.sp": 4, "parallel.tp": 1}}


def shuffle_modes(engine):
    if engine.is_first:
        engine._engine.choose_mode = ModeShuffle(engine.config.parallel.available_modes)


def text_of(output):
    return [*output.prompt_token_ids, *output.outputs[0].token_ids]


def difference(output, logprobs):
    return max(abs(a - b) for a, b in zip(all_logprobs(output), logprobs, strict=True))


def largest_error(engine, trained):
    """Generate, then score every token by the training's own forward."""
    plain = engine.generate(PROMPTS, PLAIN)  # those read cached prefixes, the others do not
    outputs = engine.generate(PROMPTS, GREEDY)
    assert [o.outputs[0].token_ids for o in plain] == [o.outputs[0].token_ids for o in outputs]
    errors = [difference(output, trained.logprobs(text_of(output))) for output in outputs]
    return max(errors), [output.outputs[0].token_ids for output in outputs]


def zero_3_everywhere():
    """As in Hugging Face's Trainer: every model that transformers makes is then partitioned at once."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})


def follow_hugging_faces_trainer():
    with training(3, 2) as trained:
        alive = zero_3_everywhere()
        with init_inference(trained.engine, **NO_LAYOUT) as engine:
            trained.step()
            engine.update_weights(trained.engine)
            error, _ = largest_error(engine, trained)
        assert alive.is_zero3()
    return error


def test_a_job_that_partitions_every_new_model_is_served(training_ranks):
    assert max(training_ranks(2).run(follow_hugging_faces_trainer)) < 1e-4


def follow_training(stage, base, changes):
    errors, tokens = [], []
    with training(stage, 2, **changes) as trained, init_inference(trained.engine, **NO_LAYOUT, **base) as engine:
        shuffle_modes(engine)
        layout = engine.config.parallel.base
        for _ in range(2):
            error, generated = largest_error(engine, trained)
            errors.append(error)
            tokens.append(generated)
            for _ in range(2):
                trained.step()
            stale, _ = largest_error(engine, trained)
            assert stale > 0.01, "weights change only when they are told to"
            engine.update_weights(trained.engine)
        errors.append(largest_error(engine, trained)[0])
        hits = engine.stats()["prefix_cache_hits"]
    return tuple(layout), errors, tokens, hits


def check(found, expected_layout):
    layout, errors, tokens, hits = found[0]
    assert all(other == found[0] for other in found)
    assert layout == expected_layout
    assert max(errors) < 1e-4
    assert tokens[0] != tokens[1]
    assert hits > 0, "prefixes were cached between updates"


@pytest.mark.parametrize(("base", "stage"), diagonal(["as trained", "tp"], [0, 1, 2, 3]))
def test_log_probabilities_are_the_training_models_own_after_every_update(stage, base, training_ranks):
    found = training_ranks(2).run(follow_training, stage, BASES[base], {})
    check(found, (2, 1) if base == "as trained" else (1, 2))


@pytest.mark.thorough
@pytest.mark.parametrize(("stage", "base"), [(3, "as trained"), (2, "sp4"), (3, "sp4")])
def test_four_ranks_that_train_two_sequences_at_a_time_are_one_replica(stage, base, training_ranks):
    found = training_ranks(4).run(follow_training, stage, BASES[base], {})
    check(found, (2, 2) if base == "as trained" else (4, 1))


SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}


@pytest.mark.thorough
@pytest.mark.parametrize(("stage", "base"), [(3, "as trained"), (2, "sp4")])
def test_heads_that_do_not_divide_over_the_ranks_follow_training(stage, base, training_ranks):
    found = training_ranks(4).run(follow_training, stage, BASES[base], SIX_HEADS)
    check(found, (2, 2) if base == "as trained" else (4, 1))


def test_tied_embeddings_stay_tied(training_ranks):
    check(training_ranks(2).run(follow_training, 3, BASES["as trained"], {"tie_word_embeddings": True}), (2, 1))


# -- groups ----------------------------------------------------------------------------------------------------------


def use_the_trainings_groups(base):
    """Which modes' SP exchanges run in the training's own group, and the largest error; training continues after it."""
    with training(2, 2) as trained:
        with init_inference(trained.engine, **NO_LAYOUT, **base, **{"runtime.collectives": "torch"}) as engine:
            shuffle_modes(engine)
            by_mode = engine._rank.groups.by_mode
            own = trained.engine.seq_parallel_group
            lent = [tuple(m) for m, made in by_mode.items() if made.sp_group and made.sp_group.process_group is own]
            error, _ = largest_error(engine, trained)
        trained.step()
    return lent, error


@pytest.mark.parametrize(("ranks", "base", "expected"), [(2, "as trained", [(2, 1)]), (4, "as trained", [(2, 2)])])
def test_sequence_parallel_exchanges_run_in_the_trainings_own_groups(ranks, base, expected, training_ranks):
    for lent, error in training_ranks(ranks).run(use_the_trainings_groups, BASES[base]):
        assert lent == expected
        assert error < 1e-4


# -- adapters --------------------------------------------------------------------------------------------------------

ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
    "more": {
        "target_modules": ["k_proj", "down_proj", "gate_proj"],
        "use_rslora": True,
        "modules_to_save": ["lm_head"],
        "rank_pattern": {"down_proj": 2},
    },
}


@pytest.mark.parametrize(
    ("stage", "lora"),
    [(2, "more"), (3, "attention"), *(pytest.param(s, "more", marks=pytest.mark.thorough) for s in (0, 1, 3))],
)
def test_lora_adapters_in_training_are_served_merged(stage, lora, training_ranks):
    check(training_ranks(2).run(follow_training, stage, BASES["as trained"], {"lora": ADAPTERS[lora]}), (2, 1))


# -- reduced precision -----------------------------------------------------------------------------------------------


def serve_bfloat16(stage):
    """Largest differences from the training's own forward, and from one in float32 with the module's own weights."""
    with training(stage, 2, dtype="bf16") as trained:
        for _ in range(3):
            trained.step()
        with init_inference(trained.engine, **NO_LAYOUT) as engine:
            trained.step()
            engine.update_weights(trained.engine)
            outputs = engine.generate(PROMPTS, GREEDY)
            rough = max(difference(output, trained.logprobs(text_of(output))) for output in outputs)
        with init_inference(trained.engine, **NO_LAYOUT, **{"model.dtype": "float32"}) as engine:
            outputs = engine.generate(PROMPTS, GREEDY)
        weights = trained.weights()
    plain = type(trained.engine.module)(trained.engine.module.config)
    plain.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    exact = max(difference(o, token_logprobs(plain.eval(), torch.tensor([text_of(o)]))) for o in outputs)
    return {str(tensor.dtype) for tensor in weights.values()}, rough, exact


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.thorough)])
def test_with_master_weights_in_float32_the_modules_own_bfloat16_ones_are_served(stage, training_ranks):
    first, second = training_ranks(2).run(serve_bfloat16, stage)
    dtypes, rough, exact = first
    assert second == first
    assert dtypes == {"torch.bfloat16"}
    assert rough < 0.1
    assert exact < 1e-4


# -- memory ----------------------------------------------------------------------------------------------------------


def budgeted(source, **overrides):
    """Bytes budgeted for this rank's weights in its share of the memory, and bytes that they really take."""
    watched = mock.patch("ulysses_infer.job.load_model.check_weights_fit")
    with watched as seen, init_inference(source, **overrides) as engine:
        return seen.call_args.args[0].weights, engine._rank.worker.model.weight_bytes


def budgets(folder):
    from transformers import AutoModelForCausalLM

    with training(2, 2) as trained:
        found = {"in training": budgeted(trained.engine, **NO_LAYOUT)}
    found["files"] = budgeted(folder, **settings(2))
    found["files of another dtype"] = budgeted(folder, **settings(2, **{"model.dtype": "bfloat16"}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found["in memory"] = budgeted(model, **settings(2))
    found["slices"] = budgeted(folder, **settings(1, 2))
    return found


def test_memory_is_budgeted_for_weights_that_ranks_copy_and_for_shared_ones(folder, training_ranks):
    for found in training_ranks(2).run(budgets, folder):
        stored = {origin: weights for origin, (_, weights) in found.items()}
        assert {origin: reckoned for origin, (reckoned, _) in found.items()} == {
            **stored,
            "files": stored["files"] // 2,
            "in memory": 0,
        }


# -- refusals --------------------------------------------------------------------------------------------------------


def refusal(changes, overrides):
    with training(0, 2, **changes) as trained, pytest.raises(ConfigError) as caught:
        init_inference(trained.engine, **NO_LAYOUT, **overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "changes", "overrides", "words"),
    [
        (2, {"lora": {"use_dora": True, "target_modules": ["q_proj"]}}, {}, "q_proj is trained with DoraLinearVariant"),
        (2, {"lora": {"peft_type": "VERA"}}, {}, "PEFT's VERA"),
        (4, {}, {"parallel.sp": 2, "parallel.tp": 1}, "parallel.sp * parallel.tp = 2 * 1 = 2, but the job has 4 ranks"),
        (4, SIX_HEADS, {"parallel.pad_heads": "never"}, "6 query heads and 2 key/value heads do not divide"),
    ],
)
def test_what_cannot_be_served_is_one_line_on_every_rank(ranks, changes, overrides, words, training_ranks):
    first, *others = training_ranks(ranks).run(refusal, changes, overrides)
    assert all(other == first for other in others)
    assert words in first, first
    assert "\n" not in first
