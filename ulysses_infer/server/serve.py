"""The `serve` command on every rank.

With several replicas each has a leader of its own, whose plans its other ranks run; all are served by one HTTP process.
Then every rank is a child of the process that was launched, and rank 0's parent coordinates the job: a replica can end
without the others.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
from contextlib import ExitStack
from functools import partial

from rich.console import Console
from rich.text import Text

from ulysses_infer.config import Config, ServerConfig
from ulysses_infer.console.banner import loading_bar, print_config
from ulysses_infer.console.screen import make_console
from ulysses_infer.engine.engine import Engine
from ulysses_infer.engine.operations import warm_up
from ulysses_infer.errors import RequestError, failure_reason, is_lost_connection
from ulysses_infer.job.follower import serve_until_shutdown
from ulysses_infer.job.kept_rank import KeptRank, fork_rank, keep_place
from ulysses_infer.job.lifetime import Guard
from ulysses_infer.job.prompt_reader import make_prompt_reader
from ulysses_infer.job.start_rank import finish_start, start_rank
from ulysses_infer.job.watchdog import Address, WatchdogClient
from ulysses_infer.job.watchdog_server import WatchdogServer
from ulysses_infer.server.coordinator import DEAD_SECONDS, LEAVE_SECONDS, SIGNAL_SECONDS, STOP_SECONDS, coordinate
from ulysses_infer.server.engine_loop import EngineLoop, describe_engine
from ulysses_infer.server.link import Link
from ulysses_infer.server.messages import Dead
from ulysses_infer.server.process import StartupSettings, announce, bind, check, http_process, url_of
from ulysses_infer.server.replicas import Replica, rendezvous_host
from ulysses_infer.text.prompts import load_tokenizer
from ulysses_infer.worker.channel import SHUTDOWN
from ulysses_infer.worker.memory import freeze_gc
from ulysses_infer.worker.rank import Rank

logger = logging.getLogger(__name__)

WATCHDOG_SECONDS = 2.0  # for rank 0 to report why a connection broke
TIMEOUT_MARGIN = 5.0  # the watchdog must fire before the collectives' own timeout: its error names the lost rank


def run(config: Config, rank: int, guard: Guard) -> None:
    """Serve until a signal or an administrator ends it. Collective. Raises `UlyssesError`s with one-line messages."""
    if config.parallel.dp > 1:
        run_replicas(config, rank, guard)
        return
    guard.start()
    replica = Replica.of(config, rank)
    if rank == 0:
        run_rank_0(config, replica, guard)
    else:
        run_follower(replica, rank, guard)


def run_replicas(config: Config, rank: int, guard: Guard) -> None:
    """Fork: the parent keeps the place of the rank, or coordinates; the child is the rank."""
    kept = fork_rank(guard)
    if isinstance(kept, KeptRank):
        run_kept_rank(config, kept, rank, guard)
    elif rank == 0:
        coordinate(config, kept, guard)
    else:
        server, index = config.server, rank // config.parallel.world_size
        limit = server.shutdown_timeout + LEAVE_SECONDS
        raise SystemExit(keep_place(kept, guard, f"the keeper of rank {rank}", index, server.heartbeat_timeout, limit))


def run_kept_rank(config: Config, kept: KeptRank, rank: int, guard: Guard) -> None:
    """A rank of one of several replicas."""
    guard.start()
    startup_info = kept.receive() if rank == 0 else b""
    if rank == 0 and not startup_info:
        raise SystemExit(1)  # the coordinator could not start and has reported why
    replica = Replica.of(config, rank)
    if rank == 0:
        replica.publish(pickle.loads(startup_info))
    if replica.rank == 0:
        run_leader(replica, rank, kept, guard)
    else:
        run_follower(replica, rank, guard, kept)


# -- rank 0 ------------------------------------------------------------------------------------------------------


def run_rank_0(config: Config, replica: Replica, guard: Guard) -> None:
    """Rank 0: bind the port first, so that a wrong one fails at once; then load the model; then serve."""
    console = make_console(0)
    check(config.server)
    listener = bind(config.server)
    url = url_of(listener, config.server)
    print_config(console, "serve", config)
    with ExitStack() as stack:
        watchdog = WatchdogServer(rendezvous_host(), config.server.heartbeat_timeout, config.runtime.step_timeout)
        process = stack.enter_context(http_process(StartupSettings(config, watchdog.address), listener))
        link = Link(process.connection)
        watchdog.on_end = lambda reason: link.send_last(Dead(reason), DEAD_SECONDS)
        rank, engine, weight_bytes = start_engine(replica, watchdog.address, console)
        loop = EngineLoop(engine, link, watchdog, config.server)
        signals = Signals(loop, watchdog, guard)
        guard.take_over(signals.take, signals.take_orphaned)
        announce(console, config, url)
        loop.run(describe_engine(engine, weight_bytes, loop.state()))
        end_engine(rank)
        watchdog.leave(STOP_SECONDS)
        process.wait(LEAVE_SECONDS)
    if signals.status:
        raise SystemExit(signals.status)


def start_engine(replica: Replica, watchdog: Address, console: Console) -> tuple[Rank, Engine, list[int]]:
    """The engine, loaded on all ranks of the replica and checked in every mode."""
    config, started = replica.config, time.monotonic()
    with loading_bar(console) as progress:
        rank = start_rank(config, None, progress, replica.meeting)

    def make_engine() -> Engine:
        prompts = make_prompt_reader(config, rank, load_tokenizer(config.model, rank.folder))
        try:
            prompts.grammars.prepare()  # now, rather than during the first requests
        except RequestError as error:
            logger.warning("structured outputs will be refused: %s", error)
        return Engine(config, rank, prompts, text=False)

    engine, weight_bytes = finish_start(rank, config, make_engine)
    rank.channel.gather(watchdog)
    rank.groups.limit_waits(config.runtime.step_timeout + TIMEOUT_MARGIN)
    warm_up(engine)
    engine.policies.prepare()
    freeze_gc()
    console.print(Text(f"  loaded in {time.monotonic() - started:.1f} s, every mode tried", style="dim"))
    return rank, engine, weight_bytes


def end_engine(rank: Rank) -> None:
    """Release the other ranks of the replica."""
    rank.groups.limit_waits(STOP_SECONDS)
    rank.channel.send(SHUTDOWN)
    rank.close()


class Signals:
    """Signal handling on rank 0, in the guard's thread: the first signal drains, a second one stops at once."""

    def __init__(self, loop: EngineLoop, watchdog: WatchdogServer, guard: Guard) -> None:
        self._loop, self._watchdog, self._guard = loop, watchdog, guard
        self._first: float | None = None
        self.status = 0
        """The exit status for the signals received."""

    def take(self, number: int) -> None:
        """Handle a signal."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._watchdog.announce_drain()
            self._loop.drain()
        elif now - self._first > SIGNAL_SECONDS:
            self._stop(number, "the server was stopped")

    def take_orphaned(self) -> None:
        """The launcher is gone. While draining that is expected; otherwise nothing supervises the job, so stop."""
        if not self._loop.is_draining:
            self._stop(15, "the launcher of the server was killed")

    def _stop(self, number: int, reason: str) -> None:
        self.status = 128 + number
        self._loop.stop(reason)
        timer = threading.Timer(STOP_SECONDS, self._force, (number,))
        timer.daemon = True
        timer.start()

    def _force(self, number: int) -> None:
        """It did not stop in time, most likely because a step hangs."""
        self._watchdog.kill_clients()
        self._guard.end(number)


# -- every other rank --------------------------------------------------------------------------------------------


def run_leader(replica: Replica, rank: int, kept: KeptRank, guard: Guard) -> None:
    """The leader of one of several replicas: like rank 0, but connected to an HTTP process that runs elsewhere."""
    startup_info, server = replica.receive(), replica.config.server
    started, engine, weight_bytes = start_engine(replica, startup_info.watchdog, make_console(rank))
    limit = replica.config.runtime.step_timeout
    link = Link(startup_info.endpoint.connect(replica.index))
    watchdog_client = WatchdogClient(
        startup_info.watchdog, f"rank {rank}", server.heartbeat_timeout, step_timeout=limit, replica=replica.index
    )
    loop = EngineLoop(engine, link, watchdog_client, server)
    watchdog_client.on_drain = loop.drain
    signals = FollowerSignals(server, rank, watchdog_client, guard)
    guard.take_over(signals.take, signals.take_orphaned)
    kept.report_serving(startup_info.watchdog)
    loop.run(describe_engine(engine, weight_bytes, loop.state()))
    end_engine(started)
    watchdog_client.leave()


def run_follower(replica: Replica, rank: int, guard: Guard, kept: KeptRank | None = None) -> None:
    """Any other rank: run its leader's plans until the leader sends the end. Raises what failed here.

    kept: for a rank of one of several replicas.
    """
    config = replica.config
    started = start_rank(config, rendezvous=replica.meeting)
    finish_start(started, config, lambda: None)
    address = started.channel.gather(None)[0]
    index = None if kept is None else replica.index
    watchdog_client = WatchdogClient(address, f"rank {rank}", config.server.heartbeat_timeout, replica=index)
    if kept is not None:
        kept.report_serving(address)
    started.groups.limit_waits(config.runtime.step_timeout + TIMEOUT_MARGIN)
    started.silent = partial(watchdog_client.silent, config.runtime.step_timeout)
    signals = FollowerSignals(config.server, rank, watchdog_client, guard)
    guard.take_over(signals.take, signals.take_orphaned)
    freeze_gc()
    try:
        serve_until_shutdown(started)
    except Exception as error:
        if is_lost_connection(error):
            time.sleep(WATCHDOG_SECONDS)  # the watchdog ends this process and reports which rank was lost
        watchdog_client.report(failure_reason(error))
        raise
    watchdog_client.leave()
    started.close()


class FollowerSignals:
    """Signal handling on the other ranks: rank 0 received the signal too and ends them within its timeouts."""

    def __init__(self, settings: ServerConfig, rank: int, watchdog_client: WatchdogClient, guard: Guard) -> None:
        self._limit = settings.shutdown_timeout + LEAVE_SECONDS
        self._rank, self._watchdog_client, self._guard = rank, watchdog_client, guard

    def take(self, number: int) -> None:
        """Leave the signal to rank 0, but only for a limited time."""
        timer = threading.Timer(self._limit, self._guard.end, (number,))
        timer.daemon = True
        timer.start()

    def take_orphaned(self) -> None:
        """The launcher on this host is gone: end this process, unless the job is ending already."""
        time.sleep(SIGNAL_SECONDS)
        if not self._watchdog_client.is_draining:
            self._watchdog_client.report(f"the launcher of rank {self._rank} was killed")
            time.sleep(WATCHDOG_SECONDS)
            self._guard.end(15)
