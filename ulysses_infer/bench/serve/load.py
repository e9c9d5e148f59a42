"""Sends requests on a schedule or at fixed concurrency, and measures the delays of the client itself."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ulysses_infer.bench.serve.answer import StreamedAnswer
from ulysses_infer.bench.serve.client import Client

LAG_SECONDS = 0.02  # interval between measurements of the event loop's lag
RETRY_SECONDS = 0.1  # pause of a closed loop after a failed request, so that it does not flood the server
START_SECONDS = 0.05  # time before the schedule starts


@dataclass(frozen=True)
class LoadRequest:
    """A request ready to be sent."""

    body: bytes
    at: float = 0.0
    """Seconds from the start."""


@dataclass
class LoadRun:
    """The answers and times of a run."""

    started: float = 0.0
    """Start of the schedule. All times are seconds of `time.perf_counter`."""
    ended: float = 0.0
    answers: list[StreamedAnswer] = field(default_factory=list)
    """In the order of their due times."""
    loop_lags: list[float] = field(default_factory=list)
    """Seconds by which the event loop was late, sampled."""
    cpu_seconds: float = 0.0
    """Processor time of this process."""
    num_connections: int = 0

    @property
    def seconds(self) -> float:
        """From the start to the last answer's end."""
        return self.ended - self.started


async def open_loop(
    client: Client, path: str, requests: Sequence[LoadRequest], max_concurrency: int | None = None
) -> LoadRun:
    """Send each request at its scheduled time, whether or not earlier ones are answered.

    A request waits while `max_concurrency` requests are in flight; `due` of its answer is the time it could be sent.
    """
    slots = _Slots(max_concurrency) if max_concurrency is not None else None
    with _measured(client) as run:
        run.started = time.perf_counter() + START_SECONDS
        tasks = []
        for request in requests:
            scheduled = run.started + request.at
            await _sleep_until(scheduled)
            freed = await slots.take() if slots is not None else -math.inf
            answer = StreamedAnswer(scheduled=scheduled, due=max(scheduled, freed))
            run.answers.append(answer)
            tasks.append(asyncio.create_task(_send(client, path, request.body, answer, slots)))
            await asyncio.sleep(0)  # lets the new task send its request now
        await asyncio.gather(*tasks)
    return run


async def closed_loop(
    client: Client, path: str, bodies: Iterator[bytes], concurrency: int, seconds: float = math.inf
) -> LoadRun:
    """Keep `concurrency` requests in flight until none are left or `seconds` have passed; then wait for the last."""
    with _measured(client) as run:
        run.started = time.perf_counter()

        async def worker() -> None:
            due = run.started
            while due - run.started < seconds:
                body = next(bodies, None)
                if body is None:
                    return
                answer = StreamedAnswer(scheduled=due, due=due)
                run.answers.append(answer)
                await client.stream(path, body, answer)
                due = answer.ended
                if answer.error is not None:
                    await asyncio.sleep(RETRY_SECONDS)
                    due = time.perf_counter()

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return run


async def _send(client: Client, path: str, body: bytes, answer: StreamedAnswer, slots: _Slots | None) -> None:
    await client.stream(path, body, answer)
    if slots is not None:
        slots.give_back(answer.ended)


class _Slots:
    """A limit on requests in flight; each free slot has the time since when it is free."""

    def __init__(self, count: int) -> None:
        self._free: asyncio.Queue[float] = asyncio.Queue()
        for _ in range(count):
            self._free.put_nowait(-math.inf)

    async def take(self) -> float:
        """Wait for a free slot; returns the time since when it is free."""
        return await self._free.get()

    def give_back(self, moment: float) -> None:
        """Free a slot; its request ended at `moment`."""
        self._free.put_nowait(moment)


async def _sleep_until(moment: float) -> None:
    """Wait until an absolute time, so that delays do not accumulate."""
    while (left := moment - time.perf_counter()) > 0:
        await asyncio.sleep(left)


@contextmanager
def _measured(client: Client) -> Iterator[LoadRun]:
    """A run with its end, CPU time and event-loop lags measured. Garbage collection is off meanwhile."""
    run = LoadRun()
    gc.collect()
    gc.disable()
    cpu, opened = time.process_time(), client.num_connections
    watch = _LoopWatch(run.loop_lags)
    try:
        yield run
    finally:
        watch.stop()
        gc.enable()
        run.ended = max((answer.ended for answer in run.answers), default=time.perf_counter())
        run.cpu_seconds = time.process_time() - cpu
        run.num_connections = client.num_connections - opened


class _LoopWatch:
    """Samples by how much the event loop is late."""

    def __init__(self, lags: list[float]) -> None:
        self._lags = lags
        self._wait()

    def stop(self) -> None:
        """Stop after a last sample, which counts a callback that is overdue."""
        self._handle.cancel()
        self._note()

    def _wait(self) -> None:
        self._due = time.perf_counter() + LAG_SECONDS
        self._handle = asyncio.get_running_loop().call_later(LAG_SECONDS, self._look)

    def _look(self) -> None:
        self._note()
        self._wait()

    def _note(self) -> None:
        self._lags.append(max(0.0, time.perf_counter() - self._due))
