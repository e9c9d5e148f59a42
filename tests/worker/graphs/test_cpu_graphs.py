"""Decode steps replayed from CPU graphs: exactly the numbers of layers run singly, in every mode, after any step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.equivalence.cases import ModeShuffle, all_logprobs
from tests.equivalence.conftest import reference as reference
from tests.equivalence.families import with_experts
from tests.selection import diagonal
from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.attention.native import NativeAttention
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.cache.paged import CacheShape
from ulysses_infer.native.library import is_available
from ulysses_infer.native.matmul import NativeMatmul
from ulysses_infer.worker.graphs.cpu_graphs import wants_cpu_graphs

pytestmark = pytest.mark.skipif(not is_available("cpu_graph"), reason="no C compiler here")
NEW_TOKENS = 24


class Replays:
    """Counts replays of this rank's graphs."""

    def __init__(self, engine: Any) -> None:
        self.runner: Any = engine._rank.worker.graphs
        self.count = 0
        if self.runner is not None:
            run = self.runner.run
            self.runner.run = lambda step, finish: self._count(run, step, finish)

    def _count(self, run: Any, step: Any, finish: Any) -> Any:
        plan = step.plan
        self.count += (plan.mode, plan.num_tokens, plan.full_logits) in self.runner._recorded
        return run(step, finish)


def run(
    folder: Path, base: tuple[int, int], prompts: list[list[int]], eager: bool | None, changes: dict[str, Any]
) -> Any:
    """On every rank: tokens, log-probabilities, and how many steps were replayed; requests come and go."""
    scored = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    arrivals = [5 * index for index in range(len(prompts))]
    with init_inference(str(folder), **settings(*base, **{"runtime.enforce_eager": eager, **changes})) as engine:
        if engine._engine is not None:
            engine._engine.choose_mode = ModeShuffle(engine.config.parallel.available_modes)
        replays = Replays(engine)
        outputs = engine.generate(prompts, scored, arrival_steps=arrivals)
        outputs += engine.generate(prompts[::-1], scored)
    return [output.outputs[0].token_ids for output in outputs], list(map(all_logprobs, outputs)), replays.count


def compare(rank_pool: Any, expected: Any, base: tuple[int, int], **changes: Any) -> int:
    """Both ways on the ranks of `base`; returns how many steps were replayed."""
    ranks = rank_pool(base[0] * base[1])
    eager, taped = (ranks.run(run, expected.folder, base, expected.prompts, how, changes) for how in (True, None))
    for (tokens, logprobs, _), (found, scores, _) in zip(eager, taped, strict=True):
        assert found == tokens
        assert scores == logprobs
    assert {count for _, _, count in eager} == {0}
    counts = {count for _, _, count in taped}
    assert len(counts) == 1
    return counts.pop()


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "base"), diagonal(["llama", "qwen3", "mistral"], [(1, 1), (2, 1), (2, 2)]))
def test_modes_and_batches_change_from_step_to_step(family, base, rank_pool, reference):
    assert compare(rank_pool, reference(family), base) > 10


@pytest.mark.distributed
def test_ranks_without_a_token_of_their_own(rank_pool, reference):
    expected = reference("llama")
    assert compare(rank_pool, expected, (4, 1), **{"scheduler.max_num_seqs": 2}) > 10


@pytest.mark.distributed
def test_sequences_are_preempted(rank_pool, reference):
    assert compare(rank_pool, reference("llama"), (2, 1), **{"cache.num_blocks": 24}) > 5


@pytest.mark.parametrize("family", ["gpt2", "deepseek_v3", "gpt_oss"])
def test_models_with_many_torch_operations(family, rank_pool, reference):
    assert compare(rank_pool, reference(family), (1, 1), **{"model.max_model_len": 128}) > 10


ROUTERS = [  # one family for each way to choose experts
    ("mixtral", "expert", (2, 1)),  # probabilities, divided by their sum
    ("qwen2_moe", "width", (2, 2)),  # probabilities; a shared expert with a gate of its own
    ("deepseek_v2", "replicate", (2, 1)),  # groups by their best expert
    ("deepseek_v3", "expert", (2, 2)),  # sigmoids with a bias, groups by their two best experts
    ("gpt_oss", "width", (1, 2)),  # a softmax of the best logits; matrices stored by input
    ("llama4_text", "expert", (2, 2)),  # one expert, whose inputs are scaled
    ("ernie4_5_moe", "expert", (4, 1)),  # probabilities with a bias
    ("granitemoe", "replicate", (2, 2)),
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "placement", "base"),
    [pytest.param(*case, marks=[] if case[0] == "deepseek_v3" else pytest.mark.thorough) for case in ROUTERS],
)
def test_experts_in_every_placement(family, placement, base, rank_pool, reference):
    expected = reference(family, **with_experts(family, 4))
    changes = {"parallel.expert_placement": placement, "model.max_model_len": 128}
    assert compare(rank_pool, expected, base, **changes) > 10


def test_without_native_collectives_steps_run_without_graphs(rank_pool, reference):
    assert compare(rank_pool, reference("llama"), (2, 1), **{"runtime.collectives": "torch"}) == 0


def test_time_in_collectives_is_still_counted(rank_pool, reference):
    seconds = rank_pool(2).run(collective_seconds, reference("llama").folder)
    assert seconds[0]["all_reduce"] > 0


def collective_seconds(folder: Path) -> dict[str, float]:
    """On every rank: what the clock has after steps that were all replayed."""
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with init_inference(str(folder), **settings(2, **{"policy.name": "static", "policy.mode": "tp"})) as engine:
        engine.generate([[1, 2, 3]], params)
        replays, clock = Replays(engine), engine._rank.worker.groups.clock
        engine.generate([[1]], SamplingParams(temperature=0, max_tokens=1))
        clock.take()
        engine.generate([[4]], params)
        assert replays.count >= 19
        return clock.take()


class TestWhetherStepsAreRecorded:
    shape = CacheShape.uniform(2, 2, 16, 16, 4, torch.float32)

    def wants(self, eager, backend=None, shape=shape, matmul=True):
        backend = backend or NativeAttention()
        return wants_cpu_graphs(eager, backend, NativeMatmul() if matmul else None, shape, torch.float32)

    def test_they_are_unless_told_otherwise(self):
        assert self.wants(None)
        assert self.wants(False)
        assert not self.wants(True)

    @pytest.mark.parametrize(("eager", "warnings"), [(None, 0), (False, 1)])
    def test_only_native_kernels_can_be(self, caplog, eager, warnings):
        assert not self.wants(eager, backend=TorchLoopAttention())
        assert len(caplog.records) == warnings
        assert not self.wants(eager, matmul=False)

    def test_a_cache_of_another_type_is_read_by_torch(self):
        assert not self.wants(None, shape=CacheShape.uniform(2, 2, 16, 16, 4, torch.bfloat16))
