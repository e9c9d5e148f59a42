"""Everything that a dry run finds out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ulysses_infer.attention.selection import BackendChoice, choose, installed_backends
from ulysses_infer.cache.budget import assumed_memory
from ulysses_infer.cli.dry_run.config_only import ConfigOnly, read_config_only
from ulysses_infer.cli.dry_run.gpus import Gpu
from ulysses_infer.cli.dry_run.meta_rank import META, MetaRank
from ulysses_infer.config import Config, choose_for_device, refuse_unavailable
from ulysses_infer.config.speculation import DRAFT_MODEL
from ulysses_infer.errors import ConfigError, first_line
from ulysses_infer.job.draft_model import draft_recipe
from ulysses_infer.job.load_model import step_bytes
from ulysses_infer.job.make_worker import attention_needs
from ulysses_infer.kernels.launch import assume, has_triton
from ulysses_infer.parallel.layout import Mode, check_mode
from ulysses_infer.worker.graphs.cuda_graphs import CudaGraphRunner
from ulysses_infer.worker.graphs.cuda_mixed_graphs import MixedGraphRunner
from ulysses_infer.worker.graphs.launch_counter import StepLaunches


@dataclass(frozen=True)
class DryRun:
    """What a start of `config` on `gpu` would do."""

    config: Config
    gpu: Gpu
    checkpoint: ConfigOnly
    rank: MetaRank
    attention: BackendChoice
    log: list[str]
    """What a start logs at level info."""
    prefills: dict[Mode, StepLaunches | str]
    """A step of prompt tokens in each mode, or why it does not run on device `meta`."""
    decodes: dict[Mode, dict[int, StepLaunches] | str]
    """Decode steps of each mode by number of rows, or why they do not run on device `meta`."""

    @property
    def buckets(self) -> dict[Mode, list[int]]:
        """Rows of the decode steps that would be captured in each mode; empty if none would be."""
        graphs = self.rank.worker.graphs
        return dict(graphs.buckets) if isinstance(graphs, CudaGraphRunner) else {}

    @property
    def mixed_sizes(self) -> dict[Mode, list[int]]:
        """Tokens of the steps with prompt tokens that would be captured in each mode; empty if none would be."""
        mixed = self.rank.worker.mixed_graphs
        return dict(mixed.sizes) if isinstance(mixed, MixedGraphRunner) else {}

    @property
    def prefill_tokens(self) -> int:
        """Tokens of the largest step of prompt tokens of one request."""
        most = self.config.scheduler.max_num_batched_tokens
        assert most is not None
        return min(most, self.rank.model.shape.max_model_len)

    @property
    def graph_bytes(self) -> int:
        """Upper bound of the temporary tensors that all CUDA graphs share."""
        largest = max((sizes[-1] for sizes in (*self.buckets.values(), *self.mixed_sizes.values())), default=0)
        model = self.rank.model
        return step_bytes(self.config, model.shape, model.dtype, largest, largest) if largest else 0


def dry_run(config: Config, gpu: Gpu) -> DryRun:
    """Do what every rank does at a start, without weights and GPUs. Raises `UlyssesError`s of one line, as a start."""
    if not has_triton():
        raise ConfigError("a dry run needs triton, which torch's builds for CUDA include; install: pip install triton")
    config = copy.deepcopy(config)
    refuse_unavailable(config)
    choose_for_device(config, "cuda")
    for mode in config.parallel.available_modes:
        check_mode(config.parallel.layout, mode)
    checkpoint = read_config_only(config.model)
    draft = read_config_only(draft_recipe(config).model) if config.speculation.method == DRAFT_MODEL else None
    memory = assumed_memory(gpu.memory, config.cache.memory_utilization)
    with assume("meta", gpu.capability), _start_log() as log:
        rank = MetaRank(config, checkpoint, memory, draft)
        needs = attention_needs(rank.model, rank.worker.cache.shape, META)
        choice = choose(config.runtime.attention_backend, needs, installed_backends() | {"triton"})
        return DryRun(config, gpu, checkpoint, rank, choice, log, _prefills(rank, config), _decodes(rank, config))


def _prefills(rank: MetaRank, config: Config) -> dict[Mode, StepLaunches | str]:
    tokens = min(config.scheduler.max_num_batched_tokens, rank.model.shape.max_model_len)
    return {mode: _try(rank, mode, 1, tokens) for mode in config.parallel.available_modes}


def _decodes(rank: MetaRank, config: Config) -> dict[Mode, dict[int, StepLaunches] | str]:
    """Those that were captured; else one, run layer by layer."""
    found: dict[Mode, dict[int, StepLaunches] | str] = {}
    for mode in config.parallel.available_modes:
        captured = {rows: step for (own, rows), step in rank.capturer.steps.items() if own == mode}
        if captured:
            found[mode] = captured
        else:
            step = _try(rank, mode, mode.sp, 1)
            found[mode] = step if isinstance(step, str) else {mode.sp: step}
    return found


def _try(rank: MetaRank, mode: Mode, num_sequences: int, tokens_each: int) -> StepLaunches | str:
    try:
        return rank.run(mode, num_sequences, tokens_each)
    except (RuntimeError, NotImplementedError) as error:  # values that only a device has
        return first_line(error)


class _Collector(logging.Handler):
    """Keeps the messages of log records."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _start_log() -> Iterator[list[str]]:
    """The messages of level info and above that the package logs within the `with` block."""
    package, collector = logging.getLogger("ulysses_infer"), _Collector()
    level, propagates = package.level, package.propagate
    package.addHandler(collector)
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield collector.messages
    finally:
        package.removeHandler(collector)
        package.setLevel(level)
        package.propagate = propagates
