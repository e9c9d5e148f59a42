"""The history as JSON for the dashboard, sent incrementally once per second."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from ulysses_infer.console.screen import mode_name
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.server.observe.history import SPAN_SECONDS, BandRow, History, ModeTotals, SecondRow
from ulysses_infer.server.observe.policies import mode_kind
from ulysses_infer.server.observe.windows import Samples

SHARES = (0.5, 0.9, 0.99)
MOST_SEGMENTS = 1000
MOST_POINTS = 180
SHORTEST_SECONDS = 10.0
DIGITS = 6
SPEED_SECONDS = 5


def window_of(seconds: float) -> float:
    """The window for a requested number of `seconds`, which may be any float."""
    return min(max(seconds, SHORTEST_SECONDS), SPAN_SECONDS) if math.isfinite(seconds) else SPAN_SECONDS


def snapshot(history: History, seconds: float, since: float | None = None) -> dict[str, Any]:
    """What happened in the last `seconds`.

    `since` is the `now` of the caller's last snapshot over the same `seconds`: rows that have not changed from
    then on are left out of `band`, `points` and `steps`; the caller has them. Its own clock must not be asked.
    """
    now = history.clock()
    window = window_of(seconds)
    start = now - window
    changed_since = -math.inf if since is None else since
    rows = [row for _, group in history.seconds.groups(start, 1, -math.inf) for row in group]
    return {
        "now": now,
        "seconds": window,
        "modes": [_mode(mode) for mode in history.modes],
        "state": _state(history),
        "speed": _speed(rows, int(now)),
        "window": _summary(rows, window, len(history.modes)),
        "totals": _totals(history.totals, len(history.modes)),
        "band": _band(history, start, window, changed_since),
        "points": _points(history, start, window, changed_since),
        "steps": list(_steps(history, start, changed_since))[::-1],
    }


def _mode(mode: tuple[int, int]) -> dict[str, Any]:
    sp, tp = mode
    return {"sp": sp, "tp": tp, "name": mode_name(Mode(sp, tp)), "kind": mode_kind(sp, tp)}


def _state(history: History) -> dict[str, Any] | None:
    state = history.state
    if state is None:
        return None
    return {
        "running": state.num_running,
        "waiting": state.num_waiting,
        "kv_cache_usage": state.kv_cache_usage,
        "snapshots": state.snapshots and {"held": state.snapshots.num_held, "slots": state.snapshots.num_slots},
        "policy": state.policy,
        "speculates": state.speculation is not None,
    }


def _speed(rows: list[SecondRow], second: int) -> dict[str, float]:
    """Current tokens per second: over the last few complete seconds."""
    last = [row for row in rows if second - SPEED_SECONDS <= row.index < second]
    return {
        "prompt": sum(row.num_prompt_tokens for row in last) / SPEED_SECONDS,
        "generated": sum(row.num_generated_tokens for row in last) / SPEED_SECONDS,
    }


# -- numbers over the window ---------------------------------------------------------------------------------------


def _summary(rows: list[SecondRow], window: float, num_modes: int) -> dict[str, Any]:
    """The totals of all rows, for the large numbers and the tables."""
    total = SecondRow(0)
    for row in rows:
        _add(total, row)
    summary = _totals(total, num_modes)
    for name, samples in (
        ("first_token", Samples().merge(row.first_token for row in rows)),
        ("inter_token", Samples().merge(row.inter_token for row in rows)),
        ("whole", Samples().merge(row.whole for row in rows)),
    ):
        summary[name] = {"count": samples.count, "percentiles": _rounded(samples.percentiles(SHARES))}
    return summary


def _add(total: SecondRow, row: SecondRow) -> None:
    total.num_prompt_tokens += row.num_prompt_tokens
    total.num_generated_tokens += row.num_generated_tokens
    total.num_switches += row.num_switches
    total.num_cache_queries += row.num_cache_queries
    total.num_cache_hits += row.num_cache_hits
    total.num_preemptions += row.num_preemptions
    total.finished.update(row.finished)
    total.drafts.add(row.drafts)
    for name, seconds in row.collectives.items():
        total.collectives[name] = total.collectives.get(name, 0.0) + seconds
    for mode, counts in row.modes.items():
        total.modes.setdefault(mode, ModeTotals()).add(counts.num_steps, counts.num_tokens, counts.seconds)


def _totals(row: SecondRow, num_modes: int) -> dict[str, Any]:
    modes = [row.modes.get(mode, ModeTotals()) for mode in range(num_modes)]
    return {
        "prompt_tokens": row.num_prompt_tokens,
        "generated_tokens": row.num_generated_tokens,
        "switches": row.num_switches,
        "preemptions": row.num_preemptions,
        "prefix_hit_rate": _ratio(row.num_cache_hits, row.num_cache_queries),
        "finished": dict(row.finished),
        "collective_seconds": {name: round(seconds, DIGITS) for name, seconds in row.collectives.items()},
        "modes": [[mode.num_steps, mode.num_tokens, round(mode.seconds, DIGITS)] for mode in modes],
        "drafts": _drafts(row),
    }


def _drafts(row: SecondRow) -> dict[str, Any]:
    """Drafts, their tokens, and the share of drafts of which the first, second ... token was accepted."""
    drafts = row.drafts
    places = range(max(drafts.accepted_per_position, default=-1) + 1)
    return {
        "count": drafts.num_drafts,
        "tokens": drafts.num_drafted,
        "accepted": drafts.num_accepted,
        "per_position": [_ratio(drafts.accepted_per_position[place], drafts.num_drafts) for place in places],
    }


# -- rows over time ------------------------------------------------------------------------------------------------


def _band(history: History, start: float, window: float, since: float) -> dict[str, Any]:
    """Rows [number, steps, tokens, decodes, seconds in each mode...], the oldest first; `width` seconds each."""
    factor = math.ceil(window / history.band.width / MOST_SEGMENTS)
    rows = [_band_row(index, group) for index, group in history.band.groups(start, factor, since)]
    return {"width": factor * history.band.width, "rows": rows[::-1]}


def _band_row(index: int, rows: list[BandRow]) -> list[Any]:
    modes = {mode for row in rows for mode in row.seconds}
    seconds = [round(sum(row.seconds.get(mode, 0.0) for row in rows), 4) for mode in range(max(modes, default=-1) + 1)]
    counts = [sum(getattr(row, name) for row in rows) for name in ("num_steps", "num_tokens", "num_decodes")]
    return [index, *counts, *seconds]


def _points(history: History, start: float, window: float, since: float) -> dict[str, Any]:
    """Rows as `columns` names them, the oldest first, `width` seconds each, for the line charts."""
    factor = math.ceil(window / MOST_POINTS)
    rows = [_point(index, group, factor) for index, group in history.seconds.groups(start, factor, since)]
    columns = ["index", "prompt", "generated", "running", "waiting", "kv_cache_usage"]
    columns += ["cache_queries", "cache_hits", "drafted", "step_output"]
    columns += [f"{name}_{share}" for name in ("first_token", "inter_token") for share in ("p50", "p90", "p99")]
    return {"width": factor, "columns": columns, "rows": rows[::-1]}


def _point(index: int, rows: list[SecondRow], width: int) -> list[Any]:
    """One point. Rates are averages over its seconds; gauges are their last values. Rows come newest first."""
    state = next((row.state for row in rows if row.state is not None), None)
    return [
        index,
        sum(row.num_prompt_tokens for row in rows) / width,
        sum(row.num_generated_tokens for row in rows) / width,
        *((None,) * 3 if state is None else (state.num_running, state.num_waiting, round(state.kv_cache_usage, 4))),
        sum(row.num_cache_queries for row in rows),
        sum(row.num_cache_hits for row in rows),
        *_per_decode(rows),
        *_rounded(Samples().merge(row.first_token for row in rows).percentiles(SHARES)),
        *_rounded(Samples().merge(row.inter_token for row in rows).percentiles(SHARES)),
    ]


def _per_decode(rows: list[SecondRow]) -> tuple[float | None, float | None]:
    """(drafted, output) tokens of a decoding request per step, on average."""
    drafted, accepted = (sum(getattr(row.drafts, name) for row in rows) for name in ("num_drafted", "num_accepted"))
    tokens = sum(mode.num_tokens for row in rows for mode in row.modes.values())
    decodes = tokens - sum(row.num_prompt_tokens for row in rows) - drafted
    return (_ratio(drafted, decodes), _ratio(decodes + accepted, decodes)) if decodes > 0 else (None, None)


def _steps(history: History, start: float, since: float) -> Iterator[list[Any]]:
    """The most recent steps, the newest first: [sequence, started, seconds, mode, tokens, decodes]."""
    for step in reversed(history.recent):
        if step.reported < since or step.started + step.seconds < start:
            return
        yield [step.sequence, round(step.started, 4), round(step.seconds, DIGITS), *step[3:6]]


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else round(value, DIGITS) for value in values]
