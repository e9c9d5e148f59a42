"""One rank of a layout on device `meta`: the loader's and worker's own code, without weights, GPU or other ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions
from ulysses_infer.attention.triton import TritonAttention
from ulysses_infer.cli.dry_run.config_only import ConfigOnly
from ulysses_infer.config import Config
from ulysses_infer.job.draft_model import load_draft, without_draft
from ulysses_infer.job.load_model import load_model, make_blueprint
from ulysses_infer.job.make_offload import sizes_of, without_offload
from ulysses_infer.job.make_worker import make_worker
from ulysses_infer.model.context import step_context
from ulysses_infer.parallel.groups import ProcessGroups
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.parallel.null import NullProcessGroup
from ulysses_infer.worker.channel import Channel
from ulysses_infer.worker.graphs.capture_checker import CaptureChecker
from ulysses_infer.worker.graphs.launch_counter import LaunchCounter, StepLaunches, counted_collectives
from ulysses_infer.worker.step import Step
from ulysses_infer.worker.step_plan import LAST_LOGITS, PlanItem, StepPlan, logits_positions

META = torch.device("meta")


class MarkedAttention(TritonAttention):
    """Tells a counter where the attention of each layer begins, and remembers the step that it belongs to."""

    def __init__(self, counter: LaunchCounter) -> None:
        self._counter = counter
        self.mode, self.num_sequences, self.num_tokens = Mode(1, 1), 0, 0

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        assert metadata.kernel is not None
        self.mode = step_context().collectives.place.mode
        self.num_sequences, self.num_tokens = metadata.kernel.num_sequences, len(metadata.slots)
        self._counter.mark()
        return super().attend(query, keys, values, metadata, options)


class CountingCapturer:
    """A `Capturer` that counts what each step launches. Of each kind and mode it checks that one can be captured."""

    def __init__(self, counter: LaunchCounter, attention: MarkedAttention) -> None:
        self._counter, self._attention = counter, attention
        self.steps: dict[tuple[Mode, int], StepLaunches] = {}
        """Decode steps by mode and number of rows."""
        self.mixed: dict[tuple[Mode, int], StepLaunches] = {}
        """Steps with prompt tokens by mode and number of tokens."""

    def capture(self, step: Callable[[], None]) -> CountingCapturer:
        """See `Capturer.capture`."""
        launches, mode = self._counter.count(step), self._attention.mode
        is_decode = self._attention.num_sequences == self._attention.num_tokens
        steps = self.steps if is_decode else self.mixed
        if all(mode != other for other, _ in steps):
            with CaptureChecker(META):  # not at the first run, which may prepare what later ones use
                step()
        steps[mode, self._attention.num_tokens] = launches
        return self

    def replay(self) -> None:
        """See `Captured.replay`. On device `meta` there is nothing to compute."""


class MetaRank:
    """The rank that stores most, with its model, budget and worker."""

    def __init__(self, config: Config, checkpoint: ConfigOnly, memory: int, draft: ConfigOnly | None = None) -> None:
        """memory: bytes that the rank may use; draft: the checkpoint of the draft model, if there is one. Raises
        `UlyssesError`s of one line, as a start does."""
        layout, self.counter = config.parallel.layout, LaunchCounter()
        self.attention = MarkedAttention(self.counter)
        self.capturer = CountingCapturer(self.counter, self.attention)
        # Shares differ by at most one row, and the last rank has the larger one.
        largest = (0,) if config.speculation.draft_ranks == "first" else dict.fromkeys((0, layout.world_size - 1))
        ranks = [self._groups(config, rank) for rank in largest]
        self.groups = max(ranks, key=lambda groups: _weight_bytes(config, checkpoint, groups, memory))
        channel = Channel(self.groups)
        self.loaded = load_model(
            config, None, None, channel, self.groups, META, layout.world_size, checkpoint=checkpoint, available=memory
        )
        self.draft = load_draft(config, self.loaded, channel, self.groups, META, layout.world_size, draft)
        self.model, budget = self.loaded.model, without_draft(self.loaded.budget, self.draft)
        self.budget = without_offload(budget, config, self.model, self.groups, META, layout.world_size)
        self.worker = make_worker(
            config, self.model, self.budget, channel, self.groups, META, self.capturer, self.attention
        )
        if self.draft is not None:
            attention = MarkedAttention(self.counter)
            self.worker.drafter = self.draft.make(META, CountingCapturer(self.counter, attention), attention)
        self.tier = sizes_of(config, self.worker) if config.cache.offload_host_bytes else None
        """The slots of the tier below the cache, if there is one."""

    def _groups(self, config: Config, rank: int) -> ProcessGroups:
        layout = config.parallel.layout
        world = NullProcessGroup(layout.world_size, rank) if layout.world_size > 1 else None
        groups = ProcessGroups(layout, rank, world=world)
        for mode in config.parallel.available_modes:
            symmetric = config.runtime.collectives != "torch"
            groups.by_mode[mode] = counted_collectives(groups.place(mode), self.counter, symmetric)
        return groups

    def run(self, mode: Mode, num_sequences: int, tokens_each: int) -> StepLaunches:
        """Run a step layer by layer, as the worker does, and count: sequences of `tokens_each` new tokens."""
        cache = self.worker.cache
        blocks = list(range(cache.shape.blocks_for(tokens_each))) * len(cache.groups.attention_spans)
        items = [PlanItem(index, 0, tokens_each, blocks, LAST_LOGITS) for index in range(num_sequences)]
        tokens = np.ones(num_sequences * tokens_each, dtype=np.int32)
        plan = StepPlan(0, mode, items, tokens, list(range(num_sequences)), full_logits=True)
        step = Step(plan, self.worker.tables.apply(plan), logits_positions(items), self.worker.next_tokens)
        return self.counter.count(lambda: self.worker.eager.run(step, _keep))


def _keep(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _weight_bytes(config: Config, checkpoint: ConfigOnly, groups: ProcessGroups, memory: int) -> int:
    return make_blueprint(config, None, checkpoint, groups, META, memory).weight_bytes
