"""The engine serves what DeepSpeed is training, on the ranks that train, and keeps up with it between steps."""

import pytest

from tests.equivalence.cases import ModeShuffle, all_logprobs
from tests.tiny import settings
from tests.training.training import training
from ulysses_infer import SamplingParams, init_inference

pytestmark = pytest.mark.distributed
PROMPTS = [[5], [7, 8, 9, 10, 11], [3] * 17]
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=0, logprobs=0)
PLAIN = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
NO_LAYOUT = {name: value for name, value in settings().items() if not name.startswith("parallel.")}
BASES = {"as trained": {}, "tp": {"parallel.sp": 1, "parallel.tp": 2}}


def shuffle_modes(engine):
    if engine.is_first:
        engine._engine.choose_mode = ModeShuffle(engine.config.parallel.available_modes)


def largest_error(engine, trained):
    """Generate, then have the training's own forward judge every token."""
    plain = engine.generate(PROMPTS, PLAIN)  # those read cached prefixes, the others do not
    outputs = engine.generate(PROMPTS, GREEDY)
    assert [o.outputs[0].token_ids for o in plain] == [o.outputs[0].token_ids for o in outputs]
    errors = [0.0]
    for output in outputs:
        expected = trained.logprobs([*output.prompt_token_ids, *output.outputs[0].token_ids])
        errors += [abs(a - b) for a, b in zip(all_logprobs(output), expected, strict=True)]
    return max(errors), [output.outputs[0].token_ids for output in outputs]


def zero_3_everywhere():
    """As Hugging Face's Trainer has it: every model that transformers makes is then partitioned at once."""
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


def follow_training(stage, base):
    errors, tokens = [], []
    with training(stage, 2) as trained, init_inference(trained.engine, **NO_LAYOUT, **base) as engine:
        shuffle_modes(engine)
        layout = engine.config.parallel.base
        for _ in range(3):
            error, generated = largest_error(engine, trained)
            errors.append(error)
            tokens.append(generated)
            for _ in range(3):
                trained.step()
            stale, _ = largest_error(engine, trained)
            assert stale > 0.01, "weights change only when they are told to"
            engine.update_weights(trained.engine)
        errors.append(largest_error(engine, trained)[0])
        hits = engine.stats()["prefix_cache_hits"]
    return tuple(layout), errors, tokens, hits


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("base", list(BASES))
def test_log_probabilities_are_the_training_models_own_after_every_update(stage, base, training_ranks):
    first, second = training_ranks(2).run(follow_training, stage, BASES[base])
    layout, errors, tokens, hits = first
    assert second == first
    assert layout == ((2, 1) if base == "as trained" else (1, 2))
    assert max(errors) < 1e-4
    assert tokens[0] != tokens[1] != tokens[2]
    assert hits > 0, "prefixes were cached between updates"
