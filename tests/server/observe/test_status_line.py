"""The log's line on load and speed."""

from __future__ import annotations

import asyncio

from tests.server.observe.traffic import SP, TP, ReplayClock, make_ready, make_state, make_step
from ulysses_infer.config import Config
from ulysses_infer.server.messages import SpeculationCounts
from ulysses_infer.server.observe import Observatory
from ulysses_infer.server.observe.history import History
from ulysses_infer.server.observe.status_line import StatusLine


def test_it_says_load_speed_modes_and_policy() -> None:
    clock = ReplayClock(100.0)
    history = History(clock)
    line = StatusLine(history)
    counts = {"prefix_cache_queries": 80, "prefix_cache_hits": 20}
    history.on_state(make_state(num_running=3, num_waiting=1, kv_cache_usage=0.251, **counts))
    for sequence, mode in enumerate((SP, TP, TP, TP)):
        history.on_step(make_step(sequence, 100.0, mode=mode, num_tokens=108, num_decodes=8))
    history.on_tokens(0.01, 50)
    clock.now = 110.0
    assert line.next() == (
        "Running: 3, waiting: 1 | KV cache: 25.1% | prompt: 40.0 tok/s, generation: 5.0 tok/s | prefix hits: 25.0% | "
        "steps: 4 (SP 4 25%, TP 4 75%), switches: 1 | policy: threshold threshold_tokens=256 base=[4, 1] shift=[1, 4]"
    )


def test_it_says_what_was_drafted() -> None:
    history = History(ReplayClock(100.0))
    line = StatusLine(history)
    history.on_state(make_state(speculation=SpeculationCounts(10, 40, 30, [10, 10, 10, 0])))
    history.on_step(make_step(0, 100.0))
    assert "drafted: 40 tokens, 75% accepted" in (line.next() or "")
    history.on_step(make_step(1, 100.0))
    assert "drafted" not in (line.next() or "")


def test_it_is_silent_until_the_engine_is_up_and_while_nothing_happens() -> None:
    history = History(ReplayClock(100.0))
    line = StatusLine(history)
    assert line.next() is None
    history.on_state(make_state())
    assert line.next() is not None
    assert line.next() is None
    history.on_state(make_state(policy={"name": "static", "mode": [4, 1]}))
    changed = line.next()
    assert changed is not None
    assert changed.endswith("policy: static mode=[4, 1]")
    history.on_step(make_step(0, 100.0))
    after = line.next()
    assert after is not None
    assert "policy" not in after
    assert line.next() is None


def test_the_task_writes_a_line_each_interval_until_it_is_cancelled() -> None:
    config = Config()
    config.server.log_interval = 0.01
    observatory = Observatory(config)
    observatory.on_ready(make_ready())
    lines: list[str] = []

    async def watch() -> None:
        task = asyncio.create_task(observatory.status_lines(lines.append))
        for sequence in range(100):
            observatory.on_step(make_state(), make_step(sequence, 0.0))
            await asyncio.sleep(0.002)
        task.cancel()

    asyncio.run(watch())
    assert 2 <= len(lines) <= 40
    assert all("steps: " in line for line in lines)
