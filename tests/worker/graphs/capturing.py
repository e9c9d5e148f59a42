"""A rank of a tiny model on device `meta` whose decode steps run as CUDA graphs capture them, under the checker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.equivalence.families import tiny_config
from tests.model.quantization.checkpoints import change_config
from tests.tiny import settings
from ulysses_infer.attention.backend import KernelAttention
from ulysses_infer.cli.dry_run.config_only import read_config_only
from ulysses_infer.cli.dry_run.meta_rank import META, MetaRank
from ulysses_infer.config import choose_for_device, load_config
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.worker.graphs.capture_checker import Allocation, CaptureChecker
from ulysses_infer.worker.graphs.cuda_graphs import Capturer, CudaGraphRunner
from ulysses_infer.worker.graphs.cuda_mixed_graphs import MixedGraphRunner
from ulysses_infer.worker.step import Step
from ulysses_infer.worker.step_plan import LAST_LOGITS, NO_LOGITS, PlanItem, StepPlan, logits_positions

MEMORY = 1 << 40
MIXED = (100, 27, 1, 1, 1)
"""Tokens of the sequences of a step: a prompt, a chunk of another, and decodes."""


class CheckingCapturer:
    """Runs each step twice, as `CudaCapturer` does, under a checker. A replay computes nothing."""

    def __init__(self) -> None:
        self.steps: list[CaptureChecker] = []

    def capture(self, step: Callable[[], None]) -> CheckingCapturer:
        with CaptureChecker(META):
            step()
        with CaptureChecker(META, records_allocations=True) as checker:
            step()
        self.steps.append(checker)
        return self

    def replay(self) -> None: ...

    @property
    def kept(self) -> list[Allocation]:
        return [each for step in self.steps for each in step.kept()]


def write_tiny(folder: Path, family: str, quantization: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The config.json of a tiny model in bfloat16."""
    tiny_config(family, dtype="bfloat16", **changes).save_pretrained(folder)
    if quantization is not None:
        change_config(folder, quantization_config=quantization)
    return folder


def make_rank(folder: Path, ranks: int, **changes: Any) -> MetaRank:
    """A rank with the modes (ranks, 1) and (1, ranks). Within `assume("meta", ...)`."""
    modes = {
        "parallel.modes": [[ranks, 1], [1, ranks]][: min(ranks, 2)],
        "runtime.device": "cuda",
        "model.path": str(folder),
    }
    few = {"scheduler.max_num_seqs": ranks, "runtime.enforce_eager": False}
    config = load_config({**settings(ranks, 1), **modes, **few, **changes})
    choose_for_device(config, "cuda")
    return MetaRank(config, read_config_only(config.model), MEMORY)


def capture(
    rank: MetaRank, max_rows: int = 2, backend: KernelAttention | None = None, capturer: Capturer | None = None
) -> CheckingCapturer:
    """Capture the steps of every mode again, under the checker. Raises `ConfigError` with the first fault."""
    worker, checking = rank.worker, CheckingCapturer()
    runner = CudaGraphRunner(
        worker.model,
        worker.cache,
        worker.groups,
        backend or rank.attention,
        worker.eager.inputs,
        capturer or checking,
        META,
        max_rows,
        worker.states,
    )
    runner.capture_all()
    count = sum(map(len, runner.buckets.values()))
    if isinstance(worker.mixed_graphs, MixedGraphRunner):
        inputs = worker.eager.inputs
        mixed = MixedGraphRunner(worker.model, worker.contexts, inputs, capturer or checking, max_rows, 64)
        mixed.capture_all()
        count += sum(map(len, mixed.sizes.values()))
    assert len(checking.steps) == count
    assert set(runner.buckets) == {Mode(*mode) for mode in rank.groups.by_mode}
    return checking


def run_step(rank: MetaRank, mode: Mode, lengths: Sequence[int], eager: bool) -> torch.Tensor:
    """Run a step of sequences of `lengths` new tokens; the second needs no logits. Returns the logits' rows.

    eager: layer by layer; else as the worker does, where replays compute nothing.
    """
    worker, cache = rank.worker, rank.worker.cache
    groups, items = len(cache.groups.attention_spans), []
    for handle, length in enumerate(lengths):
        blocks = [*range(cache.shape.blocks_for(length))] * groups
        items.append(PlanItem(handle, 0, length, blocks, NO_LOGITS if handle == 1 else LAST_LOGITS))
    plan = StepPlan(0, mode, items, np.ones(sum(lengths), dtype=np.int32), [*range(len(lengths))], full_logits=True)
    step = Step(plan, worker.tables.apply(plan), logits_positions(items), worker.next_tokens)
    runner = worker.eager if eager else worker._runner_for(plan)
    assert eager or runner in worker.all_graphs
    logits = runner.run(step, lambda logits: logits)
    assert logits is not None
    return logits
