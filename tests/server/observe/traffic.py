"""A simulated engine: requests come and go, steps run in one mode or another, and an observer gets every event."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ulysses_infer.server.client import Observer, RequestRecord
from ulysses_infer.server.messages import EngineState, Ready, SpeculationCounts, StepReport

SP, TP = (4, 1), (1, 4)
BUDGET = 2048


class ReplayClock:
    """A clock that shows any time set, and real time once `now` is None."""

    def __init__(self, now: float | None = None) -> None:
        self.now = now

    def __call__(self) -> float:
        return time.monotonic() if self.now is None else self.now


@dataclass
class Running:
    record: RequestRecord
    prompt_left: int
    output_left: int


def make_state(**changes: Any) -> EngineState:
    values: dict[str, Any] = {
        "num_running": 0,
        "num_waiting": 0,
        "kv_cache_usage": 0.0,
        "prefix_cache_queries": 0,
        "prefix_cache_hits": 0,
        "num_preemptions": 0,
        "policy": {"name": "threshold", "threshold_tokens": 256, "base": list(SP), "shift": list(TP)},
    }
    return EngineState(**(values | changes))


def make_ready(modes: list[tuple[int, int]] | None = None) -> Ready:
    return Ready("models/demo", 32768, 32000, [2], modes or [SP, TP], 8192, 16, [8_190_000_000] * 4, make_state())


def make_step(sequence: int, started: float, **changes: Any) -> StepReport:
    values: dict[str, Any] = {
        "seconds": 0.01,
        "mode": TP,
        "num_tokens": 8,
        "num_decodes": 8,
        "collective_seconds": {},
    }
    return StepReport(sequence, started, **(values | changes))


@dataclass
class Traffic:
    """Bursts of long prompts over a steady stream of decodes. `run` until a moment of the clock's."""

    observer: Observer
    clock: Callable[[], float]
    random: random.Random = field(default_factory=lambda: random.Random(7))
    policy: dict[str, Any] = field(default_factory=lambda: make_state().policy)
    load: float = 1.0
    drafts: int = 0
    """Tokens drafted for each decode; the first half of them is right."""

    def __post_init__(self) -> None:
        self.sequence = self.arrived = self.queries = self.hits = self.verified = 0
        self.waiting: list[Running] = []
        self.running: list[Running] = []
        self.now = self.clock()

    def run(self, until: float, at: Callable[[float], None]) -> None:
        """Run steps from the current time to `until`; `at(now)` is called as time passes."""
        while self.now < until:
            self._arrive()
            if self.waiting or self.running:
                self._step(at)
            else:
                self.now += 0.02
                at(self.now)

    def _arrive(self) -> None:
        """A few chats at any time; every half minute, some seconds of long documents."""
        is_burst = self.now % 31 < 7
        if self.random.random() < self.load * (0.3 if is_burst else 0.045) and len(self.waiting) < 24:
            self.arrived += 1
            prompt = self.random.choice([3000, 6000, 9000] if is_burst else [40, 90, 160, 420])
            record = RequestRecord(f"r{self.arrived}", self.now, prompt, 1)
            self.waiting.append(Running(record, prompt, self.random.randint(40, 300)))

    def _admit(self) -> None:
        while self.waiting and len(self.running) < 28:
            request = self.waiting.pop(0)
            request.record.scheduled_time = self.now
            cached = self.random.choice([0, 0, request.prompt_left // 2])
            self.queries += request.prompt_left
            self.hits += cached
            request.record.num_cached_tokens = cached
            request.prompt_left -= cached
            self.running.append(request)

    def _step(self, at: Callable[[float], None]) -> None:
        self._admit()
        decoding = [request for request in self.running if request.prompt_left == 0]
        budget = BUDGET - len(decoding)
        begun = []
        num_tokens = len(decoding)
        for request in self.running:
            if request.prompt_left and budget:
                chunk = min(budget, request.prompt_left)
                request.prompt_left -= chunk
                budget -= chunk
                num_tokens += chunk
                if not request.prompt_left:
                    begun.append(request)
        num_decodes = len(decoding) * (1 + self.drafts)
        num_tokens += len(decoding) * self.drafts
        self.verified += len(decoding)
        mode = self._mode(num_tokens)
        per_token = 3e-5 if mode == SP else 7e-5
        seconds = (0.034 if mode == SP else 0.018) + per_token * num_tokens
        seconds *= self.random.uniform(0.93, 1.1)
        started, self.now = self.now, self.now + seconds
        at(self.now)
        collectives = {"all_reduce": seconds * 0.22} if mode == TP else {"all_to_all": seconds * 0.09}
        self.observer.on_step(
            self._state(),
            StepReport(self.sequence, started, seconds, mode, num_tokens, num_decodes, collectives | {"plan": 2e-4}),
        )
        self.sequence += 1
        for request in decoding + begun:
            self._token(request)

    def _mode(self, num_tokens: int) -> tuple[int, int]:
        if self.policy["name"] == "static":
            return tuple(self.policy["mode"])
        return SP if num_tokens > self.policy["threshold_tokens"] else TP

    def _token(self, request: Running) -> None:
        record = request.record
        record.num_output_tokens += 1
        last, record.last_token_time = record.last_token_time, self.now
        if last is None:
            record.first_token_time = self.now
            self.observer.on_first_token(record)
        else:
            self.observer.on_tokens(record, self.now - last)
        request.output_left -= 1
        leaves = self.random.random() < 0.0004
        if request.output_left == 0 or leaves:
            self.running.remove(request)
            record.finish_time = self.now
            record.finish_reason = "abort" if leaves else self.random.choice(["stop", "stop", "length"])
            self.observer.on_finish(record)

    def _state(self) -> EngineState:
        tokens = sum(r.record.num_prompt_tokens + r.record.num_output_tokens for r in self.running)
        return make_state(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_cache_usage=min(1.0, tokens / 131072),
            prefix_cache_queries=self.queries,
            prefix_cache_hits=self.hits,
            policy=self.policy,
            speculation=self._speculation() if self.drafts else None,
        )

    def _speculation(self) -> SpeculationCounts:
        right = self.drafts // 2
        positions = [self.verified] * right + [0] * (self.drafts - right)
        return SpeculationCounts(self.verified, self.verified * self.drafts, self.verified * right, positions)
