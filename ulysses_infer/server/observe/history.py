"""The last minutes of the engine, for the dashboard."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

from ulysses_infer.server.client import RequestRecord
from ulysses_infer.server.messages import EngineState, SpeculationCounts, StepReport
from ulysses_infer.server.observe.windows import Samples, TimeGrid

SPAN_SECONDS = 900.0
"""How far back the history goes."""
BAND_SECONDS = 0.1
"""Resolution of the mode band."""
RECENT_STEPS = 1024


class PastStep(NamedTuple):
    """One step, with its mode by number (`History.modes`) and the time of its report."""

    sequence: int
    started: float
    seconds: float
    mode: int
    num_tokens: int
    num_decodes: int
    reported: float


class BandRow:
    """An interval of the band: how long each mode ran in it, and the steps that ended in it."""

    __slots__ = ("changed", "index", "num_decodes", "num_steps", "num_tokens", "seconds")

    def __init__(self, index: int) -> None:
        self.index, self.changed = index, 0.0
        self.num_steps = self.num_tokens = self.num_decodes = 0
        self.seconds: dict[int, float] = {}


class ModeTotals:
    """Totals of one mode."""

    __slots__ = ("num_steps", "num_tokens", "seconds")

    def __init__(self) -> None:
        self.num_steps, self.num_tokens, self.seconds = 0, 0, 0.0

    def add(self, num_steps: int, num_tokens: int, seconds: float) -> None:
        """Add steps."""
        self.num_steps += num_steps
        self.num_tokens += num_tokens
        self.seconds += seconds


class DraftTotals:
    """Totals of drafted tokens."""

    __slots__ = ("accepted_per_position", "num_accepted", "num_drafted", "num_drafts")

    def __init__(self) -> None:
        self.num_drafts = self.num_drafted = self.num_accepted = 0
        self.accepted_per_position: Counter[int] = Counter()
        """How often the first, second ... token of a draft was accepted, by its place from 0 on."""

    def add(self, other: DraftTotals) -> None:
        """Add those of another interval."""
        self.num_drafts += other.num_drafts
        self.num_drafted += other.num_drafted
        self.num_accepted += other.num_accepted
        self.accepted_per_position.update(other.accepted_per_position)

    @classmethod
    def between(cls, before: SpeculationCounts | None, after: SpeculationCounts | None) -> DraftTotals:
        """What was added to the engine's counters."""
        totals = cls()
        if after is None:
            return totals
        before = before or SpeculationCounts(0, 0, 0, [])
        totals.num_drafts = max(0, after.num_drafts - before.num_drafts)
        totals.num_drafted = max(0, after.num_draft_tokens - before.num_draft_tokens)
        totals.num_accepted = max(0, after.num_accepted_tokens - before.num_accepted_tokens)
        known = [*before.num_accepted_per_position, *[0] * len(after.num_accepted_per_position)]
        for place, (now, then) in enumerate(zip(after.num_accepted_per_position, known, strict=False)):
            if now > then:
                totals.accepted_per_position[place] = now - then
        return totals


class SecondRow:
    """Everything else that happened in one second, and the engine's last state in it."""

    def __init__(self, index: int) -> None:
        self.index, self.changed = index, 0.0
        self.num_prompt_tokens = self.num_generated_tokens = self.num_switches = 0
        self.num_cache_queries = self.num_cache_hits = self.num_preemptions = 0
        self.modes: dict[int, ModeTotals] = {}
        self.drafts = DraftTotals()
        self.state: EngineState | None = None
        self.first_token, self.inter_token, self.whole = Samples(), Samples(), Samples()
        self.finished: Counter[str] = Counter()
        self.collectives: dict[str, float] = {}


class History:
    """Takes every event in O(1) and drops what is older than `SPAN_SECONDS`; its memory is bounded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.seconds: TimeGrid[SecondRow] = TimeGrid(1.0, SPAN_SECONDS, SecondRow)
        self.band: TimeGrid[BandRow] = TimeGrid(BAND_SECONDS, SPAN_SECONDS, BandRow)
        self.recent: deque[PastStep] = deque(maxlen=RECENT_STEPS)
        self.modes: dict[tuple[int, int], int] = {}
        self.state: EngineState | None = None
        self.totals = SecondRow(0)
        """Totals since the start, without samples and state."""
        self._band_end = 0.0

    def mode_number(self, mode: tuple[int, int]) -> int:
        """Modes are numbered in order of appearance, the loaded ones first."""
        return self.modes.setdefault(mode, len(self.modes))

    def on_state(self, state: EngineState) -> None:
        """The engine's current load."""
        row = self._now()
        last, self.state = self.state, state
        row.state = state
        queries, hits, preemptions = (
            (last.prefix_cache_queries, last.prefix_cache_hits, last.num_preemptions) if last else (0, 0, 0)
        )
        drafts = DraftTotals.between(last.speculation if last else None, state.speculation)
        for each in (row, self.totals):
            each.drafts.add(drafts)
            each.num_cache_queries += max(0, state.prefix_cache_queries - queries)
            each.num_cache_hits += max(0, state.prefix_cache_hits - hits)
            each.num_preemptions += max(0, state.num_preemptions - preemptions)

    def on_step(self, step: StepReport) -> None:
        """A step ran."""
        now = self.clock()
        mode = self.mode_number(step.mode)
        switched = bool(self.recent) and self.recent[-1].mode != mode
        self.recent.append(
            PastStep(step.sequence, step.started, step.seconds, mode, step.num_tokens, step.num_decodes, now)
        )
        for row in (self._now(), self.totals):
            row.modes.setdefault(mode, ModeTotals()).add(1, step.num_tokens, step.seconds)
            row.num_prompt_tokens += step.num_tokens - step.num_decodes
            row.num_switches += switched
            for name, seconds in step.collective_seconds.items():
                row.collectives[name] = row.collectives.get(name, 0.0) + seconds
        self._draw(step, mode, now)

    def on_first_token(self, record: RequestRecord, num_new_tokens: int) -> None:
        """A prompt has been computed."""
        assert record.first_token_time is not None
        self._now().first_token.add(record.first_token_time - record.arrival_time)
        self._generated(num_new_tokens)

    def on_tokens(self, seconds: float, num_new_tokens: int) -> None:
        """A sequence got a token, `seconds` after its previous one."""
        self._now().inter_token.add(seconds)
        self._generated(num_new_tokens)

    def on_finish(self, record: RequestRecord, num_new_tokens: int) -> None:
        """A request ended."""
        reason = record.finish_reason or "error"
        row = self._now()
        row.finished[reason] += 1
        self.totals.finished[reason] += 1
        if record.finish_time is not None and reason in ("stop", "length"):
            row.whole.add(record.finish_time - record.arrival_time)
        self._generated(num_new_tokens)

    def _generated(self, num_tokens: int) -> None:
        self._now().num_generated_tokens += num_tokens
        self.totals.num_generated_tokens += num_tokens

    def _now(self) -> SecondRow:
        now = self.clock()
        return self.seconds.row(int(now), now)

    def _draw(self, step: StepReport, mode: int, now: float) -> None:
        """Add the step to the band, not before the previous step, not after now, and not before the band's start."""
        end = min(step.started + step.seconds, now)
        start = min(max(step.started, self._band_end, now - SPAN_SECONDS), end)
        self._band_end = max(end, self._band_end)
        first, last = int(start / BAND_SECONDS), int(end / BAND_SECONDS)
        for index in range(first, last + 1):
            row = self.band.row(index, now)
            inside = min(end, (index + 1) * BAND_SECONDS) - max(start, index * BAND_SECONDS)
            row.seconds[mode] = row.seconds.get(mode, 0.0) + max(0.0, inside)
        row.num_steps += 1
        row.num_tokens += step.num_tokens
        row.num_decodes += step.num_decodes
