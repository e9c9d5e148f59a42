"""The HTTP process: started by rank 0 before it loads the model, ended with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ulysses_infer.child_processes import end_with_parent
from ulysses_infer.config import Config, ServerConfig
from ulysses_infer.errors import ConfigError, UlyssesError
from ulysses_infer.job.watchdog import Address, WatchdogClient
from ulysses_infer.server.client import READ_BYTES, EngineClient, Observer
from ulysses_infer.server.frames import FrameReader
from ulysses_infer.server.messages import FromCoordinator, ReplicaLost
from ulysses_infer.server.replicas import LeaderAcceptor
from ulysses_infer.server.router import Router
from ulysses_infer.worker.memory import freeze_gc, relax_gc

SHUTDOWN_SECONDS = 1.5  # for clients to read that the engine is dead, and for /health to report it
CLOSING_SECONDS = 5  # for connections to close once every request has been answered
BACKLOG = 2048


def bind(settings: ServerConfig) -> socket.socket:
    """The listening socket, bound before the model is loaded, which may take minutes. Raises `ConfigError`."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on server.host = {settings.host}, server.port = {settings.port}: {reason}; "
            "choose another, or port 0 for any free one"
        ) from error
    return listener


def check(settings: ServerConfig) -> None:
    """Checks what would otherwise fail in the HTTP process only while the model loads. Raises `ConfigError`."""
    from ulysses_infer.server.http.texts import read_template
    from ulysses_infer.server.tool_calls import choose_format

    choose_format(settings.tool_call_parser, None)
    if settings.chat_template is not None:
        read_template(settings.chat_template)
    if settings.ssl_certfile is not None or settings.ssl_keyfile is not None:
        _check_certificate(settings)


def _check_certificate(settings: ServerConfig) -> None:
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(settings.ssl_certfile or "", settings.ssl_keyfile or "")
    except OSError as error:  # includes ssl.SSLError
        raise ConfigError(
            f"server.ssl_certfile = {settings.ssl_certfile} and server.ssl_keyfile = {settings.ssl_keyfile} cannot be "
            f"used: {error}; give a certificate and its key, both PEM"
        ) from error


def url_of(listener: socket.socket, settings: ServerConfig) -> str:
    """The URL of the server."""
    host, port = listener.getsockname()[:2]
    return url_at(host, port, settings)


def url_at(host: str, port: int, settings: ServerConfig) -> str:
    """The URL of a server at an address."""
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.ssl_certfile else 'http'}://{shown}:{port}"


def announce(console: Console, config: Config, url: str) -> None:
    """Print where the server is."""
    pages = "/v1, /docs, /dashboard" if config.server.dashboard else "/v1, /docs"
    console.print(
        Text.assemble("  serving ", (config.served_model_name, "bold"), " on ", (url, "bold"), f"  ({pages})")
    )


@dataclass(frozen=True)
class StartupSettings:
    """What the HTTP process receives when it starts."""

    config: Config
    watchdog: Address
    auth_token: bytes = b""
    """The auth token that leaders of several replicas present at the endpoint."""


class HttpProcess:
    """Rank 0's handle on the HTTP process, or the coordinator's.

    `endpoint`: the socket to which the leaders of several replicas connect.
    """

    def __init__(self, startup: StartupSettings, listener: socket.socket, endpoint: socket.socket | None) -> None:
        self.connection, theirs = socket.socketpair()
        """This process's end of the socket to it."""
        inherited = [each.fileno() for each in (theirs, listener, endpoint) if each is not None]
        root = str(Path(__file__).resolve().parents[2])
        code = f"import sys; sys.path.insert(0, {root!r}); from ulysses_infer.server.process import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, inherited)], stdin=subprocess.PIPE, pass_fds=inherited
        )
        theirs.close()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # already ended; the closed socket is noticed elsewhere
            self._process.stdin.write(pickle.dumps(startup))
            self._process.stdin.close()

    def end(self) -> int:
        """Wait until it ends; returns its exit status."""
        return self._process.wait()

    def wait(self, seconds: float) -> None:
        """Wait until it ends; kill it after `seconds`."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Kill it now."""
        self._process.kill()
        self._process.wait()


@contextmanager
def http_process(
    startup: StartupSettings, listener: socket.socket, endpoint: socket.socket | None = None
) -> Iterator[HttpProcess]:
    """The running HTTP process; it is ended when the block exits, normally or not."""
    process = HttpProcess(startup, listener, endpoint)
    listener.close()  # from here on only the HTTP process holds the ports
    if endpoint is not None:
        endpoint.close()
    try:
        yield process
    finally:
        process.kill()


def main() -> None:
    """Serve until the engine has ended or the parent is gone. Signals are left to the parent, which gets them too."""
    end_with_parent(os.getppid(), patience=SHUTDOWN_SECONDS + CLOSING_SECONDS)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    relax_gc()
    link, listener, *endpoint = (socket.socket(fileno=int(argument)) for argument in sys.argv[1:])
    startup: StartupSettings = pickle.loads(sys.stdin.buffer.read())
    import uvloop

    from ulysses_infer.console.library_logging import quiet_libraries, set_up_logging

    quiet_libraries(0)
    set_up_logging(startup.config.runtime.log_level, 0)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(startup, link, listener, *endpoint))
    except UlyssesError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


async def serve(
    startup: StartupSettings, link: socket.socket, listener: socket.socket, endpoint: socket.socket | None = None
) -> None:
    """Connect the engine, the application and the port, and run them until the end."""
    from ulysses_infer.server.http.app import make_app
    from ulysses_infer.server.http.context import make_context
    from ulysses_infer.server.observe import Observatory

    observatory = Observatory(startup.config)
    engine = Router(observatory, startup.config.parallel.dp)
    server = _make_server(make_app(make_context(startup.config, engine, observatory)), startup.config.server)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    if endpoint is None:
        tasks = await _connect(engine, startup, {0: link})
    else:
        tasks = await _connect_replicas(engine, startup, link, endpoint)
    tasks.append(asyncio.create_task(_watch_server(startup, engine)))
    tasks.append(asyncio.create_task(observatory.status_lines(_log)))
    freeze_gc()
    await asyncio.wait([serving, asyncio.create_task(engine.ended.wait())], return_when=asyncio.FIRST_COMPLETED)
    if engine.death:
        await asyncio.sleep(SHUTDOWN_SECONDS)
    server.should_exit = True
    await serving
    for task in tasks:
        task.cancel()


async def _connect(
    engine: Router, startup: StartupSettings, connections: dict[int, socket.socket]
) -> list[asyncio.Task[None]]:
    """Serve the engines at the other ends of `connections`, by replica."""
    interval = startup.config.server.stream_interval
    clients = [await _client(connections[index], engine.observers[index], interval) for index in sorted(connections)]
    return [asyncio.create_task(client.listen()) for client in clients] + engine.join(clients)


async def _connect_replicas(
    engine: Router, startup: StartupSettings, link: socket.socket, endpoint: socket.socket
) -> list[asyncio.Task[None]]:
    """The leaders of all replicas, once they have connected; `link` is the coordinator's."""
    listening = asyncio.create_task(_listen_to_coordinator(engine, link))
    acceptor = LeaderAcceptor(endpoint, startup.auth_token)
    waiting = asyncio.create_task(asyncio.to_thread(acceptor.accept, len(engine.observers)))
    await asyncio.wait([waiting, listening], return_when=asyncio.FIRST_COMPLETED)
    acceptor.close()  # the waiting thread must not keep the process alive after the job has ended
    connections = await waiting
    return [listening] if listening.done() else [listening, *await _connect(engine, startup, connections)]


async def _listen_to_coordinator(engine: Router, link: socket.socket) -> None:
    """Take the coordinator's news of replicas until it ends, and the job with it."""
    reader, _ = await asyncio.open_connection(sock=link)
    frames: FrameReader[FromCoordinator] = FrameReader(FromCoordinator)
    with contextlib.suppress(ConnectionError):  # the process is gone
        while data := await reader.read(READ_BYTES):
            for message in frames.feed(data):
                if isinstance(message, ReplicaLost):
                    engine.lose(message.index, message.reason)
                else:
                    engine.die(message.reason)
    engine.die("the coordinator's process ended")


async def _client(connection: socket.socket, observer: Observer, stream_interval: int) -> EngineClient:
    reader, writer = await asyncio.open_connection(sock=connection)
    return EngineClient(reader, writer, observer, stream_interval)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _watch_server(startup: StartupSettings, engine: Router) -> None:
    """Once the engine is up, its end or silence ends this process too; before that, the closed socket shows its end."""
    await engine.settled.wait()
    if engine.death:
        return
    loop = asyncio.get_running_loop()

    def on_end(reason: str) -> None:
        loop.call_soon_threadsafe(engine.die, reason)

    watchdog_client = WatchdogClient(
        startup.watchdog, "the HTTP process", startup.config.server.heartbeat_timeout, on_end
    )
    await engine.ended.wait()
    watchdog_client.leave()


def _make_server(app: Any, settings: ServerConfig) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        """Ignores signals: rank 0 decides when to stop."""

        def capture_signals(self) -> Any:
            return contextlib.nullcontext()

    config = uvicorn.Config(
        app,
        lifespan="off",
        access_log=False,
        log_level=logging.ERROR,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        timeout_keep_alive=60,
        http="httptools",
        ws="none",
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )
    return Server(config)
