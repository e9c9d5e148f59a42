"""Calibration: measures step times with synthetic steps on all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import numpy as np

from ulysses_infer.cache.pools import BlockPools, GroupBlockIds
from ulysses_infer.config import SchedulerConfig
from ulysses_infer.engine.calibration_points import FINE_TOKENS, TOKENS, Limits, Point, design
from ulysses_infer.engine.profile_key import profile_key
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.model import Measurement
from ulysses_infer.step_time.profile import Profile
from ulysses_infer.worker.channel import STEP, Channel
from ulysses_infer.worker.step_plan import LAST_LOGITS, PlanItem, StepPlan
from ulysses_infer.worker.worker import Worker

SYNTHETIC = -1  # sequence number of synthetic steps; the handles of their sequences are negative too
MOST_FILLED = 32768  # tokens of cache that synthetic contexts may use
FILL_CHUNK = 512
FILL_SHARE = 0.3  # share of the time spent on computing the contexts that later steps attend to
POINT_SHARE = 0.1  # share of the remaining time for one point in all modes
MAX_ROUNDS, THOROUGH_ROUNDS = 5, 15
THOROUGH_SECONDS = 60.0
SHORT_SECONDS = 0.1  # shorter steps run twice in a row, and only the second counts


Times = dict[tuple[Point, Mode], list[float]]
"""Seconds of every run of a point, per mode."""


class Calibration:
    """Runs synthetic steps. Only rank 0 has one; the other ranks run its plans."""

    def __init__(
        self,
        worker: Worker,
        channel: Channel,
        allocator: BlockPools,
        settings: SchedulerConfig,
        modes: Sequence[Mode],
        dropped: Sequence[int] = (),
    ) -> None:
        """dropped: sequences that the other ranks still have to forget."""
        self._worker, self._channel, self._allocator, self._modes = worker, channel, allocator, list(modes)
        self._settings = settings
        self._blocks: GroupBlockIds = []
        self._handles = 0
        self._recorded: set[tuple[Mode, int]] = set()
        self.dropped = list(dropped)
        """Sequences for the next plan to drop."""

    def run(self, seconds: float) -> Profile:
        """Measure for about `seconds` at most. Uses free blocks temporarily, so cached prefixes may be evicted.

        Modes alternate, so that disturbances of the machine affect all of them; the result is the median of every
        point.
        """
        started = time.perf_counter()
        thorough = seconds >= THOROUGH_SECONDS
        with self.prepared(FILL_SHARE * seconds) as (limits, times):
            runs = Rounds(self, self._modes, times)
            points = design(limits, FINE_TOKENS if thorough else TOKENS)
            runs.measure(points, started + seconds, THOROUGH_ROUNDS if thorough else MAX_ROUNDS)
        unmeasured = runs.unmeasured(points)
        notes = {
            "seconds": round(time.perf_counter() - started, 1),
            "points": len(runs.times),
            "steps": runs.steps,
            "made": time.strftime("%Y-%m-%d %H:%M:%S"),
            "designed": len(points),
            "unmeasured": len(unmeasured),
            "longest_unmeasured": max((point.shape.num_tokens for point in unmeasured), default=0),
        }
        return Profile(profile_key(self._worker, self._modes), runs.measurements(), runs.switch_seconds(), notes)

    @contextmanager
    def prepared(self, seconds: float) -> Iterator[tuple[Limits, Times]]:
        """Allocate blocks and fill them for about `seconds`; yields the limits for `step` and the times of the filling.

        Afterwards all counters and blocks are as before.
        """
        with self._borrowed_blocks():
            filled, times = self._fill(time.perf_counter() + seconds)
            yield self._limits(filled), times
        self._worker.groups.clock.take()  # collective times of synthetic steps are not reported

    def visit(self, point: Point, repeats: int) -> list[dict[Mode, float]]:
        """Seconds of `point` in every mode, with alternating modes."""
        return [
            {mode: self.time_point(point, mode)[-1] for mode in (self._modes if turn % 2 else self._modes[::-1])}
            for turn in range(repeats)
        ]

    def time_point(self, point: Point, mode: Mode) -> list[float]:
        """Seconds of each run of `point`; the last one counts. Steps too short to measure at once run twice.

        Decodes of a new number of rows run twice before: on a CPU the second run records a CPU graph.
        """
        if not point.chunks and (mode, point.decodes) not in self._recorded:
            self._recorded.add((mode, point.decodes))
            for _ in range(2):
                self.step(point, mode)
        first = self.step(point, mode)
        return [first, self.step(point, mode)] if first < SHORT_SECONDS else [first]

    @contextmanager
    def _borrowed_blocks(self) -> Iterator[None]:
        pools = self._allocator.pools
        most = self._allocator.blocks_for(MOST_FILLED)
        self._blocks = [pool.allocate(min(pool.num_free, most)) for pool in pools]
        try:
            yield
        finally:
            self._allocator.free(self._blocks)
            self._blocks = []

    def _limits(self, cached: int) -> Limits:
        """Limits of the points. The last token of the longest text is never computed."""
        tables = self._worker.tables
        return Limits(
            num_tokens=min(self._settings.max_num_batched_tokens, cached),
            num_sequences=min(self._settings.max_num_seqs - len(tables) + len(self.dropped), len(self._blocks[0])),
            context=self._worker.model.shape.max_model_len - 1,
            cached=cached,
        )

    def _fill(self, deadline: float) -> tuple[int, Times]:
        """Compute keys and values of texts of the maximum length, one chunk at a time.

        On a CPU, cache pages that were never written are not backed by memory, and reading them costs nothing. Returns
        the tokens filled, starting at the first block, and the times of the chunks, which are measurements too.
        """
        block_size = self._allocator.block_size
        room = len(self._blocks[0]) * block_size
        longest = (self._worker.model.shape.max_model_len - 1) // block_size * block_size or 1
        chunk = min(16, room, longest, self._settings.max_num_batched_tokens)
        times: Times = {}
        for mode in self._modes:
            self.step(Point(0, 0, ((0, chunk),)), mode)  # the first step of a mode initialises it
        filled, turn = 0, 0
        while filled < room:
            offset = filled // longest * longest  # the text is full: start the next one
            count = min(chunk, room - filled, longest - (filled - offset))
            point, mode = Point(0, 0, ((filled - offset, count),)), self._modes[turn % len(self._modes)]
            took = self.step(point, mode, offset // block_size)
            times.setdefault((point, mode), []).append(took)
            filled, turn = filled + count, turn + 1
            left = deadline - time.perf_counter()
            if left <= 0:
                break
            if took * 4 * 8 < left:
                chunk = min(4 * chunk, FILL_CHUNK, self._settings.max_num_batched_tokens)
        return filled, times

    def step(self, point: Point, mode: Mode, first_block: int = 0) -> float:
        """Run `point` once in `mode`, in the allocated blocks from `first_block` on; returns the seconds."""
        items, offset = [], first_block
        for start, count in point.sequences:
            self._handles -= 1
            used = self._allocator.blocks_for(start + count)
            items.append(PlanItem(self._handles, start, count, self._tables(offset, start, used), LAST_LOGITS))
            offset += used
        tokens = np.arange(sum(item.num_tokens for item in items), dtype=np.int32)
        tokens %= self._worker.model.shape.vocab_size
        moves = self._allocator.take_moves()  # of the blocks that were evicted for this
        plan = StepPlan(SYNTHETIC, mode, items, tokens, self.dropped, False, moves=moves)
        self.dropped = [item.handle for item in items]
        started = time.perf_counter()
        self._channel.send(STEP, plan.encode())
        tokens_copy = self._worker.run(plan)
        if tokens_copy is not None:
            tokens_copy.wait()
        return time.perf_counter() - started

    def _tables(self, offset: int, start: int, used: int) -> list[int]:
        """The block tables, one cache group after another, of a text of `used` blocks from allocated block `offset` on
        whose tokens before `start` are cached. Groups with fewer blocks reuse theirs in turn."""
        table: list[int] = []
        for attention_span, blocks in zip(self._allocator.attention_spans, self._blocks, strict=True):
            first = attention_span.first_visible(start) // self._allocator.block_size
            table += [blocks[(offset + block) % len(blocks)] for block in range(first, used)]
        return table


class Rounds:
    """Measures points repeatedly, in every mode, until the time is up."""

    def __init__(self, calibration: Calibration, modes: list[Mode], times: Times) -> None:
        self._calibration, self._modes = calibration, modes
        self.times = times
        self.steps = sum(map(len, times.values()))
        self._switches: list[float] = []
        self._visits = 0

    def measure(self, points: list[Point], deadline: float, most_rounds: int) -> None:
        """Visit every point in rounds; skip those that would take too much of the remaining time."""
        per_token = 0.0
        for turn in range(most_rounds):
            for point in points:
                left = deadline - time.perf_counter()
                known = [times[-1] for mode in self._modes if (times := self.times.get((point, mode)))]
                expected = max(known, default=per_token * point.shape.num_tokens) * 2 * len(self._modes)
                if left <= 0:
                    return
                if expected <= left * POINT_SHARE:
                    slowest = self._visit(point, turn)
                    per_token = slowest / point.shape.num_tokens

    def unmeasured(self, points: Sequence[Point]) -> list[Point]:
        """Those that were not measured in every mode before the time was up."""
        return [point for point in points if any((point, mode) not in self.times for mode in self._modes)]

    def _visit(self, point: Point, turn: int) -> float:
        """One measurement of a point in every mode; returns the longest."""
        self._visits += 1
        longest = 0.0
        for place, mode in enumerate(self._modes if self._visits % 2 else self._modes[::-1]):
            *before, took = self._calibration.time_point(point, mode)
            if before and turn > 0 and place > 0:  # the same step in another mode, so the difference is the switch
                self._switches.append(before[0] - took)
            self.times.setdefault((point, mode), []).append(took)
            self.steps += len(before) + 1
            longest = max(longest, took)
        return longest

    def measurements(self) -> list[Measurement]:
        """Medians over the visits of every point in every mode."""
        found = []
        for point in dict.fromkeys(point for point, _ in self.times):
            modes = [mode for mode in self._modes if (point, mode) in self.times]
            typical = typical_seconds([self.times[point, mode] for mode in modes])
            found += [Measurement(mode, point.shape, took) for mode, took in zip(modes, typical, strict=True)]
        return found

    def switch_seconds(self) -> float:
        """Median seconds that a change of mode adds to the next step."""
        return max(0.0, median(self._switches)) if self._switches else 0.0


def typical_seconds(times: Sequence[Sequence[float]]) -> list[float]:
    """A step's time in each mode, from `times` by mode and visit.

    What slows down a visit slows down all its modes. So modes are compared within visits, and only their sum is taken
    over all visits. Medians of logarithms.
    """
    if len({len(visits) for visits in times}) > 1:
        return [median(visits) for visits in times]
    logs = np.log(np.array(times))
    together = logs.mean(axis=0)
    typical: list[float] = np.exp(np.median(together) + np.median(logs - together, axis=1)).tolist()
    return typical
