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

from ulysses_infer.child_processes import end_with_parent
from ulysses_infer.config import Config, ServerConfig
from ulysses_infer.errors import ConfigError, UlyssesError
from ulysses_infer.job.watchdog import Address, WatchdogClient
from ulysses_infer.server.client import EngineClient, Observer
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
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.ssl_certfile else 'http'}://{shown}:{port}"


@dataclass(frozen=True)
class StartupSettings:
    """What the HTTP process receives when it starts."""

    config: Config
    watchdog: Address
    auth_token: bytes
    """The auth token that leaders of other replicas present at the endpoint."""


class HttpProcess:
    """Rank 0's handle on the HTTP process. `endpoint`: the socket to which leaders of other replicas connect."""

    def __init__(self, startup: StartupSettings, listener: socket.socket, endpoint: socket.socket) -> None:
        self.connection, theirs = socket.socketpair()
        """Rank 0's end of the socket to it."""
        inherited = [theirs.fileno(), listener.fileno(), endpoint.fileno()]
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

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

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
def http_process(startup: StartupSettings, listener: socket.socket, endpoint: socket.socket) -> Iterator[HttpProcess]:
    """The running HTTP process; it is ended when the block exits, normally or not."""
    process = HttpProcess(startup, listener, endpoint)
    listener.close()  # from here on only the HTTP process holds the ports
    endpoint.close()
    try:
        yield process
    finally:
        process.kill()


def main() -> None:
    """Serve until rank 0 sends the end or is gone. Signals are left to rank 0, which receives them as well."""
    end_with_parent(os.getppid(), patience=SHUTDOWN_SECONDS + CLOSING_SECONDS)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    relax_gc()
    link, listener, endpoint = (socket.socket(fileno=int(argument)) for argument in sys.argv[1:4])
    startup: StartupSettings = pickle.loads(sys.stdin.buffer.read())
    import uvloop

    from ulysses_infer.console.library_logging import quiet_libraries, set_up_logging

    quiet_libraries(0)
    set_up_logging(startup.config.runtime.log_level, 0)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(startup, link, listener, endpoint))
    except UlyssesError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


async def serve(
    startup: StartupSettings, link: socket.socket, listener: socket.socket, endpoint: socket.socket
) -> None:
    """Connect the engine, the application and the port, and run them until the end."""
    from ulysses_infer.server.http.app import make_app
    from ulysses_infer.server.http.context import make_context
    from ulysses_infer.server.observe import Observatory

    observatory = Observatory(startup.config)
    engine = Router(observatory, startup.config.parallel.dp)
    server = _make_server(make_app(make_context(startup.config, engine, observatory)), startup.config.server)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    tasks = await _connect(engine, startup, link, endpoint)
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
    engine: Router, startup: StartupSettings, link: socket.socket, endpoint: socket.socket
) -> list[asyncio.Task[None]]:
    """Rank 0's socket, and those of other replicas' leaders once they have connected."""
    interval = startup.config.server.stream_interval
    first = await _client(link, engine.observers[0], interval)
    listening = [asyncio.create_task(first.listen())]
    acceptor = LeaderAcceptor(endpoint, startup.auth_token)
    waiting = asyncio.create_task(asyncio.to_thread(acceptor.accept, len(engine.observers) - 1))
    await asyncio.wait([waiting, asyncio.create_task(first.ended.wait())], return_when=asyncio.FIRST_COMPLETED)
    acceptor.close()  # the waiting thread must not keep the process alive after the engine died
    connections = await waiting
    others = [await _client(connections[index], engine.observers[index], interval) for index in sorted(connections)]
    listening += [asyncio.create_task(client.listen()) for client in others]
    return listening + engine.join([first, *others])


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
