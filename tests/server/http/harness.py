"""The application on a real port, in a thread of its own, with a fake engine behind it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from transformers import AutoTokenizer

from tests.server.fake_engine import FakeEngine, Script
from tests.tiny import write_tokenizer
from ulysses_infer.config import Config, ModelConfig, ServerConfig
from ulysses_infer.server.client import EngineClient
from ulysses_infer.server.http.app import make_app
from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.texts import Texts
from ulysses_infer.server.observe import Observatory

MODEL = "tiny"


def tiny_texts(folder: Path) -> Texts:
    write_tokenizer(folder)
    return Texts(AutoTokenizer.from_pretrained(folder))


async def connect(texts: Texts, is_ready: bool = True, **settings: Any) -> tuple[AppContext, FakeEngine, list[Any]]:
    """A context whose client talks to a fake engine on this event loop; the last are tasks to cancel."""
    config = Config(model=ModelConfig(path=MODEL), server=ServerConfig(**settings))
    observatory = Observatory(config)
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    client = EngineClient(reader, writer, observatory)
    listening = asyncio.create_task(client.listen())
    engine = FakeEngine(texts.decoder)
    await engine.connect(theirs, is_ready)
    if is_ready:
        await client.settled.wait()
    return AppContext(config, client, texts, observatory), engine, [listening]


class Served:
    """A running server."""

    def __init__(self, texts: Texts, is_ready: bool = True, **settings: Any) -> None:
        self._texts, self._is_ready, self._settings = texts, is_ready, settings
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._started.wait(20)
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, verify=False, timeout=20)
        self.openai = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, http_client=self.http)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.context, self.engine, tasks = await connect(self._texts, self._is_ready, **self._settings)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            make_app(self.context),
            lifespan="off",
            log_level="critical",
            http="httptools",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        serving = asyncio.create_task(self._server.serve([listener]))
        while not self._server.started:
            await asyncio.sleep(0.005)
        self._started.set()
        await serving
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def call_soon(self, action: Callable[[], None]) -> None:
        """Run `action` on the server's event loop."""
        self._loop.call_soon_threadsafe(action)

    def script(self, **changes: Any) -> None:
        self.engine.script = Script(**changes)

    def reset(self) -> None:
        self.engine.script = Script()
        self.engine.submits.clear()
        self.engine.aborts.clear()
        self.engine.calls.clear()
        self.engine.replies.clear()

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)


@contextmanager
def served(texts: Texts, is_ready: bool = True, **settings: Any) -> Iterator[Served]:
    server = Served(texts, is_ready, **settings)
    try:
        yield server
    finally:
        with contextlib.suppress(RuntimeError):
            server.stop()


def wait_for(condition: Callable[[], Any], seconds: float = 5.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing came in time"
        time.sleep(0.005)
    return value
