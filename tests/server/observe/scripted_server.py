"""The server around the live page, with simulated traffic: `python -m tests.server.observe.scripted_server PORT`."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from tests.server.observe.traffic import ReplayClock, Traffic, make_ready, make_state
from ulysses_infer.config import Config
from ulysses_infer.server.observe import Observatory

ADMIN_KEY = "open-sesame"


class ScriptedServer:
    """The routes that the page uses. `past`: seconds of traffic before it starts; `live`: whether more follows."""

    def __init__(
        self, past: float = 60.0, live: bool = True, api_key: str | None = None, model: str = "", drafts: int = 0
    ) -> None:
        config = Config()
        config.server.served_model_name = model or "make-believe"
        self.live, self.api_key, self.drained = live, api_key, False
        self.requests: list[dict[str, Any]] = []
        now = time.monotonic()
        self.clock = ReplayClock(now - past)
        self.observatory = Observatory(config, self.clock)
        self.traffic = Traffic(self.observatory, self.clock, drafts=drafts)
        self.observatory.on_ready(make_ready())
        if past:
            self.traffic.run(now, lambda moment: setattr(self.clock, "now", moment))
        self.clock.now = None
        self.app = self._make_app()

    def _make_app(self) -> FastAPI:
        app = FastAPI(lifespan=self._lifespan)
        app.add_api_route("/dashboard", self._page)
        app.add_api_route("/dashboard/data", self._data)
        app.add_api_route("/metrics", self._metrics)
        app.add_api_route("/admin/policy", self._policy)
        app.add_api_route("/admin/policy", self._set_policy, methods=["PUT"])
        app.add_api_route("/admin/drain", self._drain, methods=["POST"])
        app.add_middleware(self.observatory.middleware)
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(self._go_on())
        yield
        task.cancel()

    async def _go_on(self) -> None:
        while self.live:
            await asyncio.sleep(0.02)
            self.traffic.run(time.monotonic(), lambda moment: None)

    async def _page(self) -> HTMLResponse:
        return HTMLResponse(self.observatory.page(), headers=self.observatory.page_headers)

    async def _data(self, request: Request, seconds: float = 120.0, since: float | None = None) -> Response:
        if self.api_key and self._key(request) not in (self.api_key,):
            return self._refuse(401, "the API key is missing or wrong")
        return JSONResponse(self.observatory.snapshot(seconds, since))

    async def _metrics(self) -> Response:
        return Response(self.observatory.metrics_text(), media_type=self.observatory.metrics_content_type)

    async def _policy(self, request: Request) -> Response:
        if self._key(request) != ADMIN_KEY:
            return self._refuse(401, "the admin key is missing or wrong")
        return JSONResponse({"policy": self.traffic.policy})

    async def _set_policy(self, request: Request) -> Response:
        if self._key(request) != ADMIN_KEY:
            return self._refuse(401, "the admin key is missing or wrong")
        body = await request.json()
        self.requests.append(body)
        settings = body["settings"]
        if body["name"] == "static":
            self.traffic.policy = {"name": "static", "mode": settings["mode"]}
        elif settings.get("threshold_tokens", -1) < 0:
            return self._refuse(400, "policy.threshold_tokens -1 is not a token count; use an integer from 0 up")
        else:
            self.traffic.policy = make_state().policy | settings
        self.observatory.on_step(self.traffic._state(), None)
        return JSONResponse({"policy": self.traffic.policy})

    async def _drain(self, request: Request) -> Response:
        if self._key(request) != ADMIN_KEY:
            return self._refuse(401, "the admin key is missing or wrong")
        self.drained = True
        self.observatory.on_draining(time.monotonic() + 30)
        return JSONResponse({})

    def _key(self, request: Request) -> str:
        return request.headers.get("authorization", "").removeprefix("Bearer ")

    def _refuse(self, status: int, message: str) -> Response:
        return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, status)

    # -- running it ------------------------------------------------------------------------------------------------

    def start(self, port: int = 0) -> str:
        """Serve in a thread; returns the page's address."""
        listener = socket.create_server(("127.0.0.1", port))
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="error", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/dashboard"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


if __name__ == "__main__":
    print(ScriptedServer(past=float(sys.argv[2]), live=len(sys.argv) < 4).start(int(sys.argv[1])), flush=True)
    threading.Event().wait()
