"""The coordinator of several replicas: the parent of rank 0 and of the HTTP process, and the watchdog of all ranks.

It computes nothing, so that it outlives the failures of ranks. A replica that fails ends alone; the job ends with the
last one, with the HTTP process or with the coordinator.
"""

from __future__ import annotations

import pickle
import time
from contextlib import ExitStack

from ulysses_infer.config import Config
from ulysses_infer.console.banner import print_config
from ulysses_infer.console.screen import make_console
from ulysses_infer.job.kept_rank import Keeper
from ulysses_infer.job.lifetime import Guard
from ulysses_infer.job.watchdog_server import WatchdogServer
from ulysses_infer.server.link import Link
from ulysses_infer.server.messages import Dead, ReplicaLost
from ulysses_infer.server.process import StartupSettings, announce, bind, check, http_process, url_of
from ulysses_infer.server.replicas import StartupInfo, make_endpoint, rendezvous_host

STOP_SECONDS = 3.0  # for a server told to stop at once, before it is killed
DEAD_SECONDS = STOP_SECONDS / 10  # for the HTTP process to read why the job ends
LEAVE_SECONDS = 10.0  # for the HTTP process to close its connections
# signals within this interval count as one: launchers repeat a signal that the whole process group got
SIGNAL_SECONDS = 1.0


def coordinate(config: Config, keeper: Keeper, guard: Guard) -> None:
    """Serve until a signal or an administrator ends it. keeper: of rank 0. Raises `ConfigError`, SystemExit."""
    console = make_console(0)
    check(config.server)
    listener = bind(config.server)
    url = url_of(listener, config.server)
    print_config(console, "serve", config)
    guard.start()
    with ExitStack() as stack:
        watchdog = _make_watchdog(config)
        leaders_listener, endpoint = make_endpoint(rendezvous_host())
        startup = StartupSettings(config, watchdog.address, endpoint.auth_token)
        process = stack.enter_context(http_process(startup, listener, leaders_listener))
        link = Link(process.connection)
        watchdog.on_end = lambda reason: link.send_last(Dead(reason), DEAD_SECONDS)
        watchdog.on_lost = lambda index, reason: link.send(ReplicaLost(index, reason))
        keeper.send(pickle.dumps(StartupInfo(watchdog.address, endpoint)))
        if keeper.watchdog() is None:
            raise SystemExit(keeper.wait() or 1)
        signals = CoordinatorSignals(watchdog, guard)
        guard.take_over(signals.take, signals.take_orphaned)
        announce(console, config, url)
        if process.end() != 0:
            watchdog.fail("the HTTP process ended unexpectedly")
        watchdog.leave(STOP_SECONDS)
    keeper.wait()


def _make_watchdog(config: Config) -> WatchdogServer:
    return WatchdogServer(
        rendezvous_host(),
        config.server.heartbeat_timeout,
        config.runtime.step_timeout,
        config.parallel.dp,
        config.parallel.num_ranks,
    )


class CoordinatorSignals:
    """Signal handling in the guard's thread: the first signal drains all replicas, a second one stops at once."""

    def __init__(self, watchdog: WatchdogServer, guard: Guard) -> None:
        self._watchdog, self._guard = watchdog, guard
        self._first: float | None = None

    def take(self, number: int) -> None:
        """Handle a signal."""
        now = time.monotonic()
        if not self._watchdog.is_complete:  # other replicas still load: there is nothing to drain
            self._guard.end(number)
        elif self._first is None:
            self._first = now
            self._watchdog.announce_drain()
        elif now - self._first > SIGNAL_SECONDS:
            self._watchdog.fail("the server was stopped", status=128 + number)

    def take_orphaned(self) -> None:
        """The launcher is gone. While draining that is expected; otherwise nothing supervises the job, so stop."""
        if not self._watchdog.is_draining:
            self._watchdog.fail("the launcher of the server was killed", status=128 + 15)
