"""State invariance: the states of recurrent layers that a rank keeps do not depend on the modes of the steps.

Compared directly on every rank, all convolution and recurrent states of every sequence, SP against TP against modes
mixed at random. In the first layer they are bitwise equal: the weights and inputs there are small multiples of powers
of two, so that products come out the same however they are cut, and the inner part is the same in every mode. Later
layers read sums over the TP group, which adds in another order: they agree within rounding.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.tiny_models import make_checkpoint, make_prompts
from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference

TOLERANCE = 1e-5  # of the largest value of a state: float32, summed in another order, through up to 43 updates
EPSILON = dict.fromkeys(("rms_norm_eps", "norm_eps", "layer_norm_epsilon"), 1e-9)  # 1 + epsilon is 1
NORMS = ("input_layernorm", "operator_norm", "norm")
READ_SUMS = {"inkling_text": (2, 3)}
"""States in the first layer that hold sums over the TP group: of the residual stream's convolutions."""
LENGTHS, NEW_TOKENS = (1, 7, 21, 38), 6


class RowRecorder:
    """Follows a rank's plans and remembers the state slot of every sequence."""

    def __init__(self, tables: Any) -> None:
        self.apply_plan, self.rows = tables.apply, dict[int, int]()
        tables.apply = self.apply

    def apply(self, plan: Any) -> Any:
        arrays = self.apply_plan(plan)
        self.rows |= {item.handle: int(row) for item, row in zip(plan.items, arrays.rows, strict=True)}
        return arrays

    def take(self) -> torch.Tensor:
        """The slots in order of arrival; clears the record."""
        slots = torch.tensor([row for _, row in sorted(self.rows.items())])
        self.rows = {}
        return slots


def make_exact(kind: str, folder: Path) -> None:
    """A checkpoint whose first layer computes exactly: embeddings of 1 and -1, weights of 0, 1/8 and -1/8."""
    config = next(tiny_configs(kind))
    for name, value in EPSILON.items():
        if hasattr(config, name):
            setattr(config, name, value)
    model = make_checkpoint(config, folder)
    layer = model.get_decoder().layers[0]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.randint(2, embedding.shape, generator=generator) * 2 - 1)
        norm = next(getattr(layer, name) for name in NORMS if hasattr(layer, name))
        adds_one = type(norm).__name__ == "Qwen3NextRMSNorm"
        norm.weight.fill_(0.0 if adds_one else 1.0)
        if (inner := getattr(model.get_input_embeddings(), "embed_norm", None)) is not None:
            inner.weight.fill_(1.0)
        for linear in (each for each in layer.modules() if isinstance(each, torch.nn.Linear)):
            linear.weight.copy_((torch.randint(3, linear.weight.shape, generator=generator) - 1) / 8)
    model.save_pretrained(folder)


def compare_modes(folder: str, sp: int, tp: int, prompts: list[list[int]]) -> list[dict[Any, tuple[float, bool, int]]]:
    """On a rank: for each other choice of modes and each state, the largest difference, equality, and the elements."""
    changes = {
        "model.max_model_len": 128,
        "cache.enable_prefix_caching": False,
        "scheduler.max_num_batched_tokens": 16,
    }
    with init_inference(folder, **settings(sp, tp, **changes)) as engine:
        recorder = RowRecorder(engine._rank.worker.tables)
        modes = engine.config.parallel.available_modes
        shuffled = random.Random(0)
        choices = [lambda _, mode=mode: mode for mode in modes] + [lambda _: shuffled.choice(modes)]
        runs = [_states_after(engine, recorder, choose, prompts) for choose in choices]
    reference = runs[0]
    assert all(float(state.abs().max()) > 0.05 for state in reference.values()), "there is something to compare"
    return [{key: _compared(run[key], wanted) for key, wanted in reference.items()} for run in runs[1:]]


def _states_after(engine: Any, recorder: RowRecorder, choose: Any, prompts: list[list[int]]) -> dict[Any, torch.Tensor]:
    if engine.is_first:
        engine._engine.choose_mode = choose
    engine.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True))
    slots, states = recorder.take(), engine._rank.worker.states
    assert len(slots) == len(prompts) == len(set(slots.tolist())), "no slot was used twice"
    return {(s.layer, s.kind, s.index): states.get(s.layer, s.kind, s.index, slots) for s in states.shapes}


def _compared(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, bool, int]:
    return float((found - wanted).abs().max() / wanted.abs().max()), torch.equal(found, wanted), found.numel()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "sp", "tp"),
    [
        ("qwen3_next", 2, 1),
        ("mamba2", 4, 1),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in (
                ("qwen3_next", 4, 1),
                ("qwen3_next", 2, 2),
                ("mamba2", 2, 2),
                ("lfm2", 4, 1),
                ("mamba", 4, 1),
                ("inkling_text", 4, 1),
                ("inkling_text", 2, 2),
            )
        ),
    ],
)
def test_every_mode_leaves_the_same_states(tmp_path: Path, rank_pool: Any, kind: str, sp: int, tp: int) -> None:
    make_exact(kind, tmp_path)
    results = rank_pool(sp * tp).run(compare_modes, str(tmp_path), sp, tp, make_prompts(101, LENGTHS))
    for of_rank in results:
        assert len(of_rank) == len([mode for mode in (1, 2, 4) if mode <= sp])
        for run in of_rank:
            for (layer, _, index), (difference, equal, count) in run.items():
                assert count > 0
                exact = layer == 0 and index not in READ_SUMS.get(kind, ())
                assert equal if exact else difference <= TOLERANCE
