"""The `serve` command on every rank.

With several replicas each has a leader of its own, whose plans its ranks follow; all are served by one HTTP process.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from contextlib import ExitStack

from rich.console import Console
from rich.text import Text

from ulysses_infer.config import Config, ServerConfig
from ulysses_infer.console.banner import loading_bar, print_config
from ulysses_infer.console.screen import make_console
from ulysses_infer.engine.engine import Engine
from ulysses_infer.engine.operations import warm_up
from ulysses_infer.errors import ConfigError, RequestError, failure_reason, is_lost_connection
from ulysses_infer.host import ranks_on_this_host
from ulysses_infer.job.follower import serve_until_shutdown
from ulysses_infer.job.lifetime import Guard
from ulysses_infer.job.prompt_reader import make_prompt_reader
from ulysses_infer.job.start_rank import finish_start, start_rank
from ulysses_infer.job.watchdog import Address, WatchdogClient, WatchdogServer
from ulysses_infer.server.link import Link
from ulysses_infer.server.messages import Dead
from ulysses_infer.server.process import Order, bind, check, http_process, url_of
from ulysses_infer.server.replicas import News, Replica, make_door
from ulysses_infer.server.serving import Serving, describe_engine
from ulysses_infer.text.prompts import load_tokenizer
from ulysses_infer.worker.channel import SHUTDOWN
from ulysses_infer.worker.memory import freeze_gc
from ulysses_infer.worker.rank import Rank

logger = logging.getLogger(__name__)

NEEDED = ("fastapi", "uvicorn", "uvloop", "httptools", "msgspec", "prometheus_client", "regex")
STOP_SECONDS = 3.0  # for a server told to stop now, before it is made to
LEAVE_SECONDS = 10.0  # for the HTTP process to close its connections
SIGNAL_SECONDS = 1.0  # signals this close are one: a launcher repeats what its whole group got
WORD_SECONDS = 2.0  # for rank 0 to say why a connection broke
TIMEOUT_MARGIN = 5.0  # the watchdog comes before the collectives' own time limit: it knows more


def run(config: Config, rank: int, guard: Guard) -> None:
    """Serve until a signal or an administrator ends it. Collective. Raises `UlyssesError`s of one line."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serve needs {', '.join(missing)}; install the package with its extra: ulysses_infer[serve]")
    replica = Replica.of(config, rank)
    if rank == 0:
        lead(config, replica, guard)
    elif replica.rank == 0:
        assist(replica, rank, guard)
    else:
        follow(replica, rank, guard)


# -- rank 0 ------------------------------------------------------------------------------------------------------


def lead(config: Config, replica: Replica, guard: Guard) -> None:
    """Rank 0: the port first, so that a wrong one is known at once; then the model; then requests."""
    console = make_console(0)
    check(config.server)
    listener = bind(config.server)
    url = url_of(listener, config.server)
    print_config(console, "serve", config)
    with ExitStack() as stack:
        hub = WatchdogServer(_hub_host(), config.server.heartbeat_timeout, config.runtime.step_timeout)
        entrance, door = make_door(_hub_host())
        process = stack.enter_context(http_process(Order(config, hub.address, door.word), listener, entrance))
        link = Link(process.connection)
        hub.on_end = lambda reason: _say_dead(link, reason)
        replica.tell(News(hub.address, door))
        rank, engine, weight_bytes = _start(replica, hub.address, console)
        serving = Serving(engine, link, hub, config.server)
        signals = Signals(serving, hub, guard)
        guard.take_over(signals.take, signals.take_orphaned)
        _announce(console, config, url)
        serving.run(describe_engine(engine, weight_bytes, serving.state()))
        _end(rank)
        hub.leave(STOP_SECONDS)
        process.wait(LEAVE_SECONDS)
    if signals.status:
        raise SystemExit(signals.status)


def _start(replica: Replica, hub: Address, console: Console) -> tuple[Rank, Engine, list[int]]:
    """The engine, loaded on all ranks of the replica, and proved to run in every mode."""
    config, started = replica.config, time.monotonic()
    with loading_bar(console) as progress:
        rank = start_rank(config, None, progress, replica.meeting)

    def make_engine() -> Engine:
        prompts = make_prompt_reader(config, rank, load_tokenizer(config.model, rank.folder))
        try:
            prompts.grammars.prepare()  # now, rather than between the steps of whoever is served by then
        except RequestError as error:
            logger.warning("structured outputs will be refused: %s", error)
        return Engine(config, rank, prompts, text=False)

    engine, weight_bytes = finish_start(rank, config, make_engine)
    rank.channel.gather(hub)
    rank.groups.limit_waits(config.runtime.step_timeout + TIMEOUT_MARGIN)
    warm_up(engine)
    engine.policies.prepare()
    freeze_gc()
    console.print(Text(f"  loaded in {time.monotonic() - started:.1f} s, every mode tried", style="dim"))
    return rank, engine, weight_bytes


def _hub_host() -> str:
    """The address by which other hosts know this one, if there are any."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return "127.0.0.1" if ranks_on_this_host(world_size) == world_size else os.environ["MASTER_ADDR"]


def _say_dead(link: Link, reason: str) -> None:
    link.send(Dead(reason))
    link.flush(STOP_SECONDS / 10)


def _announce(console: Console, config: Config, url: str) -> None:
    name = config.served_model_name
    pages = "/v1, /docs, /dashboard" if config.server.dashboard else "/v1, /docs"
    console.print(Text.assemble("  serving ", (name, "bold"), " on ", (url, "bold"), f"  ({pages})"))


def _end(rank: Rank) -> None:
    """Let the other ranks of the replica go."""
    rank.groups.limit_waits(STOP_SECONDS)
    rank.channel.send(SHUTDOWN)
    rank.close()


class Signals:
    """What signals mean to rank 0, heard in the guard's thread: the first drains, a second one stops at once."""

    def __init__(self, serving: Serving, hub: WatchdogServer, guard: Guard) -> None:
        self._serving, self._hub, self._guard = serving, hub, guard
        self._first: float | None = None
        self.status = 0
        """The exit status that the signals ask for."""

    def take(self, number: int) -> None:
        """A signal came."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._hub.announce_drain()
            self._serving.drain()
        elif now - self._first > SIGNAL_SECONDS:
            self._stop(number, "the server was stopped")

    def take_orphaned(self) -> None:
        """The launcher is gone. While draining that is part of the end; otherwise nobody looks after the job."""
        if not self._serving.is_draining:
            self._stop(15, "the launcher of the server was killed")

    def _stop(self, number: int, reason: str) -> None:
        self.status = 128 + number
        self._serving.stop(reason)
        timer = threading.Timer(STOP_SECONDS, self._force, (number,))
        timer.daemon = True
        timer.start()

    def _force(self, number: int) -> None:
        """It did not stop in time: a step hangs, most likely."""
        self._hub.kill_clients()
        self._guard.end(number)


# -- every other rank --------------------------------------------------------------------------------------------


def assist(replica: Replica, rank: int, guard: Guard) -> None:
    """The leader of another replica: as rank 0, but the HTTP process and the last word are elsewhere."""
    news, server = replica.hear(), replica.config.server
    started, engine, weight_bytes = _start(replica, news.hub, make_console(rank))
    limit = replica.config.runtime.step_timeout
    member = WatchdogClient(news.hub, f"rank {rank}", server.heartbeat_timeout, step_timeout=limit)
    serving = Serving(engine, Link(news.door.enter(replica.index)), member, server)
    patience = Patience(server, rank, member, guard)
    guard.take_over(patience.take, patience.take_orphaned)
    serving.run(describe_engine(engine, weight_bytes, serving.state()))
    _end(started)
    member.leave()


def follow(replica: Replica, rank: int, guard: Guard) -> None:
    """Any other rank: run its leader's plans until it says that is all. Raises what went wrong here."""
    config = replica.config
    started = start_rank(config, rendezvous=replica.meeting)
    finish_start(started, config, lambda: None)
    address = started.channel.gather(None)[0]
    member = WatchdogClient(address, f"rank {rank}", config.server.heartbeat_timeout)
    started.groups.limit_waits(config.runtime.step_timeout + TIMEOUT_MARGIN)
    patience = Patience(config.server, rank, member, guard)
    guard.take_over(patience.take, patience.take_orphaned)
    freeze_gc()
    try:
        serve_until_shutdown(started)
    except Exception as error:
        if is_lost_connection(error):
            time.sleep(WORD_SECONDS)  # the heartbeat ends this process, and says who was lost
        member.report(failure_reason(error))
        raise
    member.leave()
    started.close()


class Patience:
    """What signals mean to the other ranks: rank 0 got them too and will say when to end, within its limits."""

    def __init__(self, settings: ServerConfig, rank: int, member: WatchdogClient, guard: Guard) -> None:
        self._limit = settings.shutdown_timeout + LEAVE_SECONDS
        self._rank, self._member, self._guard = rank, member, guard

    def take(self, number: int) -> None:
        """A signal came: leave it to rank 0, but not for ever."""
        timer = threading.Timer(self._limit, self._guard.end, (number,))
        timer.daemon = True
        timer.start()

    def take_orphaned(self) -> None:
        """The launcher on this host is gone: unless the job is ending anyhow, that ends it."""
        time.sleep(SIGNAL_SECONDS)
        if not self._member.is_draining:
            self._member.report(f"the launcher of rank {self._rank} was killed")
            time.sleep(WORD_SECONDS)
            self._guard.end(15)
