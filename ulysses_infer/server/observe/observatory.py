"""Collects engine events into metrics, dashboard and logs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from ulysses_infer.config import Config
from ulysses_infer.server.client import DEAD, DEGRADED, DRAINING, READY, STARTING, RequestRecord
from ulysses_infer.server.messages import EngineState, Ready, StepReport
from ulysses_infer.server.observe.dashboard import Dashboard
from ulysses_infer.server.observe.history import History
from ulysses_infer.server.observe.metrics import Metrics
from ulysses_infer.server.observe.middleware import Application, HttpObserver, write_json_line
from ulysses_infer.server.observe.snapshot import snapshot
from ulysses_infer.server.observe.status_line import StatusLine

logger = logging.getLogger(__name__)


class Observatory:
    """An `Observer` of the engine's client. Every method belongs to the event loop's thread. labels: of its metrics,
    beside the model's name.

    The HTTP process makes one, hands it to `EngineClient`, mounts its page, data and metrics, wraps its application
    in `middleware` (outermost) and runs `status_lines(...)` as a task, which it cancels when it ends:
    `asyncio.create_task(observatory.status_lines(logger.info))`.
    """

    metrics_content_type = CONTENT_TYPE_LATEST
    """Of `scrape`."""

    def __init__(
        self, config: Config, clock: Callable[[], float] = time.monotonic, labels: Mapping[str, str] = {}
    ) -> None:
        self._config = config.server
        self._clock = clock
        self.model_name = config.served_model_name
        self._metrics = Metrics({"model_name": self.model_name, **labels})
        self._history = History(clock)
        self._dashboard = Dashboard()
        self._started = clock()
        self._info: Ready | None = None
        self._status, self._reason = STARTING, ""
        self._dead_replicas: dict[int, str] = {}
        self._drain_deadline: float | None = None
        self._num_reported: dict[str, int] = {}  # output tokens of each running request that were counted

    # -- what routes use -----------------------------------------------------------------------------------------

    def metrics_text(self) -> bytes:
        """The metrics of this process in Prometheus' text format."""
        return self._metrics.text()

    async def scrape(self) -> bytes:
        """The body of `/metrics`."""
        return self.metrics_text()

    def page(self) -> str:
        """The body of `/dashboard`: HTML. Send `page_headers` with it. It holds no data, so it needs no key."""
        return self._dashboard.page

    @property
    def page_headers(self) -> dict[str, str]:
        """Headers of `/dashboard`, including a Content-Security-Policy."""
        return self._dashboard.headers

    def snapshot(self, seconds: float, since: float | None = None) -> dict[str, Any]:
        """The body of `/dashboard/data?seconds=…&since=…`: the last `seconds` (10 to 900; others are clipped).

        `since`: the `now` of the caller's last snapshot, if it has that and wants only what is new in the rows.
        """
        now = self._clock()
        return {
            "model": self.model_name,
            "status": DEGRADED if self._status == READY and self._dead_replicas else self._status,
            "reason": self._reason,
            "dead_replicas": [{"replica": index, "reason": why} for index, why in self._dead_replicas.items()],
            "uptime": now - self._started,
            "drain_seconds": None if self._drain_deadline is None else max(0.0, self._drain_deadline - now),
            "engine": self._engine(),
            **snapshot(self._history, seconds, since),
        }

    def middleware(self, app: Application) -> HttpObserver:
        """`app` with request ids, HTTP metrics and, if configured, an access log."""
        return HttpObserver(app, self._metrics.on_http, write_json_line if self._config.access_log else None)

    async def status_lines(self, write: Callable[[str], None]) -> None:
        """Pass a line on load and speed to `write` every `server.log_interval` seconds, unless nothing happened.

        Runs until it is cancelled.
        """
        line = StatusLine(self._history)
        while True:
            await asyncio.sleep(self._config.log_interval)
            text = line.next()
            if text is not None:
                write(text)

    # -- events from the engine client ---------------------------------------------------------------------------

    def on_ready(self, info: Ready) -> None:
        """The engine is up."""
        self._info, self._status = info, READY
        self._metrics.on_up(True)
        for mode in info.modes:
            self._history.mode_number(mode)
        self.on_step(info.state, None)

    def on_step(self, state: EngineState, step: StepReport | None) -> None:
        """A step ran, or the state changed without one."""
        self._metrics.on_state(state)
        self._history.on_state(state)
        if step is not None:
            self._metrics.on_step(step)
            self._history.on_step(step)

    def on_first_token(self, record: RequestRecord) -> None:
        """A request's prompt has been computed."""
        num_new_tokens = self._num_new_tokens(record)
        self._metrics.on_first_token(record, num_new_tokens)
        self._history.on_first_token(record, num_new_tokens)

    def on_tokens(self, record: RequestRecord, seconds: float) -> None:
        """A sequence got a token, `seconds` after its previous one."""
        num_new_tokens = self._num_new_tokens(record)
        self._metrics.on_tokens(seconds, num_new_tokens)
        self._history.on_tokens(seconds, num_new_tokens)

    def on_finish(self, record: RequestRecord) -> None:
        """A request ended."""
        num_new_tokens = self._num_new_tokens(record)
        del self._num_reported[record.request_id]
        self._metrics.on_finish(record, num_new_tokens)
        self._history.on_finish(record, num_new_tokens)
        logger.debug("%s", record)

    def on_draining(self, deadline: float) -> None:
        """The server accepts no more requests; running ones have until `deadline` (monotonic clock)."""
        if self._status != DEAD:
            self._status, self._drain_deadline = DRAINING, deadline

    def on_replica_dead(self, dead: Mapping[int, str]) -> None:
        """Another replica is dead while others serve. dead: why each dead one is, by its index."""
        self._dead_replicas = dict(dead)
        self._metrics.on_dead_replicas(len(dead))

    def on_dead(self, reason: str) -> None:
        """The engine is dead."""
        self._status, self._reason, self._drain_deadline = DEAD, reason, None
        self._metrics.on_up(False)

    def _num_new_tokens(self, record: RequestRecord) -> int:
        """Output tokens since this request's last event. Not every token has its own event: the first tokens of a
        request's other sequences have none."""
        before = self._num_reported.get(record.request_id, 0)
        self._num_reported[record.request_id] = record.num_output_tokens
        return record.num_output_tokens - before

    def _engine(self) -> dict[str, Any] | None:
        info = self._info
        if info is None:
            return None
        return {
            "max_model_len": info.max_model_len,
            "num_blocks": info.num_blocks,
            "block_size": info.block_size,
            "weight_bytes_per_rank": info.weight_bytes_per_rank,
        }
