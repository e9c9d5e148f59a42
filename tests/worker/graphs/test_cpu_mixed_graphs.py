"""Steps with prompt tokens replayed from CPU graphs: the tokens of layers run singly, in every mode."""

from __future__ import annotations

import random
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.equivalence.cases import ModeShuffle, all_logprobs
from tests.equivalence.conftest import reference as reference
from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.native.library import is_available

pytestmark = pytest.mark.skipif(not is_available("cpu_graph"), reason="no C compiler here")
SCORED = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0, prompt_logprobs=0)
LENGTHS = (33, 64, 71, 90, 40, 64)
WIDE = {"scheduler.max_num_batched_tokens": 64}
ROUNDING = 1e-5  # padding may make another kernel the fastest, which sums in another order


def random_prompts(seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, 90) for _ in range(length)] for length in LENGTHS]


class Replays:
    """Counts this rank's replays of steps with prompt tokens."""

    def __init__(self, engine: Any) -> None:
        self.runner: Any = engine._rank.worker.mixed_graphs
        self.count = 0
        if self.runner is not None:
            self._run, self.runner.run = self.runner.run, self._counted

    def _counted(self, step: Any, finish: Any) -> Any:
        self.count += (step.plan.mode, self.runner.num_rows(step.plan)) in self.runner._recorded
        return self._run(step, finish)


def answers(engine: Any, rounds: int = 4) -> Any:
    """Token ids and all log-probabilities; prompts come while others decode, and together."""
    outputs = []
    for number in range(rounds):
        prompts = random_prompts(number)
        outputs += engine.generate(prompts, SCORED, arrival_steps=[2 * place for place in range(len(prompts))])
        outputs += engine.generate(prompts[:2], SCORED)
    return [output.outputs[0].token_ids for output in outputs], list(map(all_logprobs, outputs))


def run(folder: Path, base: tuple[int, int], eager: bool | None, changes: dict[str, Any]) -> Any:
    """On every rank: answers, and how many steps were replayed. Modes change at random."""
    with init_inference(str(folder), **settings(*base, **{"runtime.enforce_eager": eager, **changes})) as engine:
        if engine._engine is not None:
            engine._engine.choose_mode = ModeShuffle(engine.config.parallel.available_modes)
        replays = Replays(engine)
        return answers(engine), replays.count


def compare(rank_pool: Any, folder: Path, base: tuple[int, int], **changes: Any) -> int:
    """Both ways on the ranks of `base`; returns how many steps were replayed."""
    ranks = rank_pool(base[0] * base[1])
    changes = {"cache.num_blocks": 128, "scheduler.max_num_batched_tokens": 96, "model.max_model_len": 128, **changes}
    eager, taped = (ranks.run(run, folder, base, how, changes) for how in (True, None))
    for ((tokens, logprobs), _), ((found, scores), _) in zip(eager, taped, strict=True):
        assert found == tokens
        assert [len(row) for row in scores] == [len(row) for row in logprobs]
        assert [*chain(*scores)] == pytest.approx([*chain(*logprobs)], abs=ROUNDING)
    assert {count for _, count in eager} == {0}
    (count,) = {count for _, count in taped}
    return count


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "base"),
    [
        ("llama", (1, 1)),
        ("mistral", (2, 1)),
        ("qwen3", (2, 2)),
        pytest.param("gpt_oss", (1, 2), marks=pytest.mark.thorough),
        pytest.param("phi3", (2, 1), marks=pytest.mark.thorough),
        pytest.param("mixtral", (2, 1), marks=pytest.mark.thorough),
        pytest.param("llama", (4, 1), marks=pytest.mark.thorough),
    ],
)
def test_modes_chunks_and_batches_change_from_step_to_step(family, base, rank_pool, reference):
    assert compare(rank_pool, reference(family).folder, base) > 4


@pytest.mark.parametrize("quantize", ["int8", pytest.param("int4", marks=pytest.mark.thorough)])
def test_quantised_weights(quantize, rank_pool, reference):
    changes = {"model.quantize": quantize}
    assert compare(rank_pool, reference("llama").folder, (1, 1), **changes) > 5


@pytest.mark.distributed
def test_sequences_are_preempted(rank_pool, reference):
    assert compare(rank_pool, reference("llama").folder, (2, 1), **{"cache.num_blocks": 40}) > 4


def test_chunks_that_need_no_logits_are_replayed(rank_pool, reference):
    """One request at a time, whose prompt takes several steps."""
    changes = {"scheduler.max_num_seqs": 1, "scheduler.max_num_batched_tokens": 40}
    assert compare(rank_pool, reference("llama").folder, (1, 1), **changes) > 5


def recorded_after(folder: Path, change: str) -> Any:
    """On every rank: answers before and after a change of addresses, and how many kinds of steps are recorded."""
    with init_inference(str(folder), **settings(1, **{"model.max_model_len": 128, "cache.num_blocks": 128})) as engine:
        before, runner = answers(engine), engine._rank.worker.mixed_graphs
        counts = [runner.num_recorded]
        if change == "weights":
            engine.update_weights(str(folder))
        else:
            engine.sleep(1)
            engine.wake_up()
        counts.append(runner.num_recorded)
        after = answers(engine)
        return before, after, [*counts, runner.num_recorded]


@pytest.mark.parametrize("change", ["weights", "sleep"])
def test_steps_are_recorded_again_when_memory_has_moved(change, rank_pool, reference):
    ((before, after, (first, moved, again)),) = rank_pool(1).run(recorded_after, reference("llama").folder, change)
    assert after[0] == before[0]
    assert [*chain(*after[1])] == pytest.approx([*chain(*before[1])], abs=ROUNDING)
    assert first > 0
    assert again > 0
    assert moved == 0 or change == "weights"  # new weights drop graphs when the next step runs


def recorded_limit(folder: Path, limit: int) -> Any:
    with init_inference(str(folder), **settings(1, **{"runtime.max_captured_tokens": limit, **WIDE})) as engine:
        runner = engine._rank.worker.mixed_graphs
        return None if runner is None else runner._max_tokens


@pytest.mark.parametrize(("limit", "expected"), [(0, None), (31, None), (48, 48)])
def test_a_limit_of_the_recipe_holds(limit, expected, rank_pool, reference):
    assert rank_pool(1).run(recorded_limit, reference("llama").folder, limit) == [expected]


def settled_steps(folder: Path) -> list[bool]:
    """On every rank: whether each step was settled, of three equal prompts one after another."""
    found = []
    with init_inference(str(folder), **settings(1, **{"cache.enable_prefix_caching": False, **WIDE})) as engine:
        worker = engine._rank.worker
        run_step = worker.run

        def run_and_note(*arguments: Any) -> Any:
            result = run_step(*arguments)
            found.append(worker.is_settled)
            return result

        worker.run = run_and_note
        for _ in range(3):
            engine.generate([[5] * 40], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    return found


def test_only_steps_that_are_recorded_are_not_settled(rank_pool, reference):
    """Also for decodes: the first of its size, and the one that is recorded."""
    (found,) = rank_pool(1).run(settled_steps, reference("llama").folder)
    assert found == [False, False, False, True, *[True] * 8]
