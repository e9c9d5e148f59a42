"""Counters per mode, and a record of each recent step."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ulysses_infer.engine.policies.policy import Decision
from ulysses_infer.errors import RequestError
from ulysses_infer.parallel.layout import Mode

RECENT_STEPS = 65536


class StepRecord(NamedTuple):
    """One step as it ran."""

    sequence: int
    mode: Mode
    num_tokens: int
    num_decodes: int
    """Tokens of decodes, drafted ones included."""
    seconds: float
    decision: Decision | None = None

    def explain(self) -> str:
        """Why it ran in its mode, with predicted and measured times, in one line."""
        why = f"{self.mode}" if self.decision is None else self.decision.explain(self.seconds)
        return f"step {self.sequence}, {self.num_tokens} tokens: {why}"


@dataclass
class ModeCounters:
    """Totals of the steps of one mode."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class StepStats:
    """Totals per mode, switches, and a record of each of the last `RECENT_STEPS` steps."""

    def __init__(self) -> None:
        self.by_mode: defaultdict[Mode, ModeCounters] = defaultdict(ModeCounters)
        self.switches: Counter[tuple[Mode, Mode]] = Counter()
        self.recent: deque[StepRecord] = deque(maxlen=RECENT_STEPS)

    def record(self, step: StepRecord) -> None:
        """Count one step."""
        counters = self.by_mode[step.mode]
        counters.steps += 1
        counters.tokens += step.num_tokens
        counters.seconds += step.seconds
        if self.recent and self.recent[-1].mode != step.mode:
            self.switches[self.recent[-1].mode, step.mode] += 1
        self.recent.append(step)

    def find(self, sequence: int | None = None) -> StepRecord:
        """The record of a step by its number; None: the latest. Raises `RequestError` if it is not kept."""
        if not self.recent:
            raise RequestError("no step has run yet")
        first, last = self.recent[0].sequence, self.recent[-1].sequence
        wanted = last if sequence is None else sequence
        if not first <= wanted <= last:
            raise RequestError(f"step {wanted} is not known; the records are of steps {first} to {last}")
        return self.recent[wanted - first]

    def as_dict(self) -> dict[str, Any]:
        """Plain values: `modes` by name, `switches` in total, `switches_by_pair`."""
        return {
            "modes": {str(mode): asdict(counters) for mode, counters in self.by_mode.items()},
            "switches": sum(self.switches.values()),
            "switches_by_pair": {f"{a}->{b}": count for (a, b), count in self.switches.items()},
        }
