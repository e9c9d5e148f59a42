"""DeepSpeed's rollout contract on two ranks of a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import settings
from tests.training.training import training

pytestmark = pytest.mark.distributed
PAD, NEW = 0, 6


def padded(prompts: list[list[int]]) -> Any:
    from deepspeed.runtime.rollout.base import RolloutRequest

    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return RolloutRequest(ids, mask)


def roll_out(stage: int, sequence_parallel: int) -> dict[str, Any]:
    """On a rank: rollouts before and after an optimizer step, and with two samples per prompt."""
    import torch.distributed as dist
    from deepspeed.runtime.rollout.base import RolloutEngine, SamplingConfig

    from ulysses_infer.rl.deepspeed import UlyssesRollout

    rank = dist.get_rank() // sequence_parallel
    prompts = [[5 + rank, 9], [7, 8, 9, 10 + rank]][: 2 - rank]  # ranks differ in number and content
    greedy = SamplingConfig(max_new_tokens=NEW, temperature=0.0)
    with training(stage, sequence_parallel) as trained:
        rollout = UlyssesRollout(trained.engine, PAD, sleep_level=1, **settings(2))
        assert isinstance(rollout, RolloutEngine)
        found = {"prompts": prompts, "before": rollout.generate(padded(prompts), greedy)}
        trained.step()
        rollout.sync_weights(1)
        found["after"] = rollout.generate(padded(prompts), greedy)
        found["sampled"] = rollout.generate(padded(prompts), SamplingConfig(NEW, 1.0, n_samples_per_prompt=2))
        rollout.engine.wake_up()
        found["engine"] = [
            output.outputs[0].token_ids
            for output in rollout.engine.generate(prompts if sequence_parallel == 2 else [[5, 9]], _params())
        ]
        rollout.shutdown()
    return found


def _params() -> Any:
    from ulysses_infer import SamplingParams

    return SamplingParams(temperature=0, max_tokens=NEW)


def _row(batch: Any, index: int) -> list[int]:
    return batch.input_ids[index][batch.attention_mask[index].bool()].tolist()


@pytest.mark.parametrize(("stage", "sequence_parallel"), [(3, 1), pytest.param(2, 2, marks=pytest.mark.thorough)])
def test_every_rank_gets_the_outputs_of_its_own_prompts(
    stage: int, sequence_parallel: int, training_ranks: Any
) -> None:
    ranks = training_ranks(2).run(roll_out, stage, sequence_parallel)
    for found in ranks:
        for name, copies in (("before", 1), ("after", 1), ("sampled", 2)):
            batch = found[name]
            width = max(map(len, found["prompts"]))
            assert batch.batch_size == copies * len(found["prompts"])
            assert batch.response_start_idx.tolist() == [width] * batch.batch_size
            rows = [_row(batch, index) for index in range(batch.batch_size)]
            starts = [row[: len(prompt)] for row, prompt in zip(rows[::copies], found["prompts"], strict=True)]
            assert starts == found["prompts"]
        assert not torch.equal(found["before"].input_ids, found["after"].input_ids)
    if sequence_parallel == 2:
        assert torch.equal(ranks[0]["sampled"].input_ids, ranks[1]["sampled"].input_ids)
    first = _row(ranks[0]["after"], 0)
    assert first[len(ranks[0]["prompts"][0]) :] == ranks[0]["engine"][0]
