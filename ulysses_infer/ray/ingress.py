"""The ingress: the HTTP application of a job's server, whose engine is the replicas of a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from ulysses_infer.config import Config
from ulysses_infer.console.library_logging import quiet_libraries, set_up_logging
from ulysses_infer.ray.metrics import IngressObservatory
from ulysses_infer.ray.remote_engine import RemoteEngine
from ulysses_infer.server.client import EngineClient

logger = logging.getLogger(__name__)


class Ingress:
    """Answers HTTP requests. It starts to once the first replica is up. replicas: the handle of their deployment."""

    async def __init__(self, config: Config, replicas: Any) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        quiet_libraries(0)
        set_up_logging(config.runtime.log_level, 0)
        from ulysses_infer.server.http.app import make_app
        from ulysses_infer.server.http.context import make_context

        ours, theirs = socket.socketpair()
        engine = RemoteEngine(replicas, *await asyncio.open_connection(sock=theirs))
        observatory = IngressObservatory(config, engine.metrics)
        reader, writer = await asyncio.open_connection(sock=ours)
        self._client = EngineClient(reader, writer, observatory, config.server.stream_interval)
        self._tasks = [
            asyncio.create_task(self._client.listen()),
            asyncio.create_task(engine.run()),
            asyncio.create_task(observatory.status_lines(logger.info)),
        ]
        await self._client.settled.wait()
        self._app = make_app(make_context(config, self._client, observatory))

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray Serve calls for the application."""
        return self._app
