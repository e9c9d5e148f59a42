"""The periodic log line on load and throughput."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ulysses_infer.console.screen import mode_name
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.server.messages import EngineState
from ulysses_infer.server.observe.history import History
from ulysses_infer.server.observe.policies import describe_settings


@dataclass
class _Counts:
    """The running totals used by the line, at one moment."""

    time: float
    prompt: int
    generated: int
    queries: int
    hits: int
    switches: int
    drafted: int
    accepted: int
    steps: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def of(cls, history: History) -> _Counts:
        totals = history.totals
        known = {mode: totals.modes.get(number) for mode, number in history.modes.items()}
        steps = {mode: counts.num_steps for mode, counts in known.items() if counts is not None}
        return cls(
            history.clock(),
            totals.num_prompt_tokens,
            totals.num_generated_tokens,
            totals.num_cache_queries,
            totals.num_cache_hits,
            totals.num_switches,
            totals.drafts.num_drafted,
            totals.drafts.num_accepted,
            steps,
        )


class StatusLine:
    """Summarizes load and throughput since the previous line."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._before = _Counts.of(history)
        self._last_load: tuple[int, int] | None = None
        self._last_policy: dict[str, Any] | None = None

    def next(self) -> str | None:
        """The line, or None if no step ran and load and policy have not changed since the last line.

        Includes the policy if it changed.
        """
        before, self._before = self._before, _Counts.of(self._history)
        state = self._history.state
        if state is None:
            return None
        load, policy = (state.num_running, state.num_waiting), state.policy
        if (before.steps, self._last_load, self._last_policy) == (self._before.steps, load, policy):
            return None
        parts = [*_load(state), *_speed(before, self._before), *_modes(before, self._before)]
        if policy != self._last_policy:
            parts.append(f"policy: {policy.get('name')} {describe_settings(policy)}".rstrip())
        self._last_load, self._last_policy = load, policy
        return " | ".join(parts)


def _load(state: EngineState) -> list[str]:
    return [f"Running: {state.num_running}, waiting: {state.num_waiting}", f"KV cache: {state.kv_cache_usage:.1%}"]


def _speed(before: _Counts, after: _Counts) -> list[str]:
    seconds = max(after.time - before.time, 1e-3)
    prompt, generated = (after.prompt - before.prompt) / seconds, (after.generated - before.generated) / seconds
    parts = [f"prompt: {prompt:.1f} tok/s, generation: {generated:.1f} tok/s"]
    if after.queries > before.queries:
        parts.append(f"prefix hits: {(after.hits - before.hits) / (after.queries - before.queries):.1%}")
    drafted = after.drafted - before.drafted
    if drafted:
        parts.append(f"drafted: {drafted} tokens, {(after.accepted - before.accepted) / drafted:.0%} accepted")
    return parts


def _modes(before: _Counts, after: _Counts) -> list[str]:
    """Share of steps in each mode."""
    steps = {mode: count - before.steps.get(mode, 0) for mode, count in after.steps.items()}
    total = sum(steps.values())
    if not total:
        return []
    shares = ", ".join(f"{mode_name(Mode(*mode))} {count / total:.0%}" for mode, count in steps.items() if count)
    return [f"steps: {total} ({shares}), switches: {after.switches - before.switches}"]
