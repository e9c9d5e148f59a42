"""A server for the rollouts of a training library: its processes, and its routes as methods.

The actors of verl and OpenRLHF run one each. So requests go on while weights change, and outputs have their versions.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import httpx

from ulysses_infer.child_processes import end_children_with_this_process, variables_of_another_job
from ulysses_infer.config import Config, load_config
from ulysses_infer.errors import EngineDeadError, RequestError, first_line, kind_and_line
from ulysses_infer.job.processes import free_port
from ulysses_infer.outputs import CompletionOutput
from ulysses_infer.rl.remote import complete
from ulysses_infer.sampling_params import SamplingParams

POLL_SECONDS = 0.2
STOP_SECONDS = 30.0
FIRST_VERSION = "0"
"""Of the weights that the server starts with."""


class EngineServer:
    """One replica on this host. Its processes end with this one.

    settings: of the recipe, dotted keys or nested; host: the address that clients use. Raises `ConfigError` for wrong
    settings.
    """

    def __init__(self, settings: Mapping[str, Any], host: str = "127.0.0.1") -> None:
        key, self.port = secrets.token_hex(16), free_port()
        own = {"server.host": host, "server.port": self.port, "server.admin_api_key": key}
        self._settings = {**settings, **own}
        self.config: Config = load_config(None, self._settings)
        """All settings."""
        self.address = f"[{host}]" if ":" in host else host
        limits, headers = httpx.Limits(max_connections=None), {"Authorization": f"Bearer {key}"}
        url = f"http://{self.address}:{self.port}"
        self._client = httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=None)
        self._process: subprocess.Popen[bytes] | None = None
        self._closed_for: set[str] = set()

    async def start(self, environment: Mapping[str, str] = {}) -> None:
        """Start the processes and wait until they take requests. environment: variables that they get besides those of
        this process. Raises `EngineDeadError` if they end."""
        end_children_with_this_process()
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as recipe:
            json.dump(self._settings, recipe)
            recipe.flush()
            command = [sys.executable, "-m", "ulysses_infer.cli.main", "serve", "--config", recipe.name]
            self._process = subprocess.Popen(command, env={**variables_of_another_job(), **environment})
            while not await self._is_ready():
                status = self._process.poll()
                if status is not None:
                    raise EngineDeadError(f"the server of the rollouts ended with status {status}; its output says why")
                await asyncio.sleep(POLL_SECONDS)
        await self.call("/update_weight_version", {"new_version": FIRST_VERSION})

    async def _is_ready(self) -> bool:
        try:
            return (await self._client.get("/ready")).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """End the processes."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()

    # -- requests ----------------------------------------------------------------------------------------------

    async def generate(
        self, prompt: list[int], params: SamplingParams, request_id: str | None = None
    ) -> tuple[CompletionOutput, list[str]]:
        """One completion, and the versions of the weights that computed it. Its finish reason is "abort" if it was
        aborted. Raises `RequestError`, and `EngineDeadError` if the server is gone."""
        try:
            return await complete(self._client, prompt, params, request_id)
        except httpx.TransportError as error:
            raise EngineDeadError(f"the server of the rollouts is gone: {kind_and_line(error)}") from error

    async def abort(self, request_id: str) -> bool:
        """End one request; returns whether it ran."""
        answer = await self.call("/abort_requests", {"request_ids": [request_id]})
        return bool(answer["aborted"])

    async def close(self, reason: str, mode: str = "keep") -> None:
        """Stop running steps until `open` for every reason given so far. mode: as of /pause."""
        self._closed_for.add(reason)
        await self.call(f"/pause?mode={mode}")

    async def open(self, reason: str) -> None:
        """Run steps again, unless they are stopped for another reason."""
        self._closed_for.discard(reason)
        if not self._closed_for:
            await self.call("/resume")

    # -- weights and memory ------------------------------------------------------------------------------------

    async def load_weights(self, folder: str, version: str | None) -> None:
        """Serve the weights in a folder on this host. Running requests are kept and go on with them; their cache is
        computed again. version: the tag of outputs from now on."""
        await self.close("weights")
        try:
            await self.call("/update_weights", {"update_info": {"path": folder}})
            if version is not None:
                await self.call("/update_weight_version", {"new_version": version})
        finally:
            await self.open("weights")

    async def sleep(self, level: int) -> None:
        """Free memory once running requests have ended; those that come later wait. level: as of /sleep."""
        await self.close("sleep", "wait")
        await self.call(f"/sleep?level={level}")

    async def wake_up(self) -> None:
        """Take the memory of the cache again, and the requests that waited."""
        await self.call("/wake_up")
        await self.open("sleep")

    async def call(self, path: str, body: Any = None) -> Any:
        """POST to an administrative route. Raises `RequestError` with what the server says."""
        try:
            answer = await self._client.post(path, json=body)
        except httpx.TransportError as error:
            raise EngineDeadError(f"the server of the rollouts is gone: {kind_and_line(error)}") from error
        if answer.status_code != httpx.codes.OK:
            raise RequestError(f"{path}: {answer.json()['error']['message']}")
        return answer.json()


def plain_params(given: Any) -> SamplingParams:
    """`SamplingParams` of another library's object with vLLM's fields, or of a mapping. Raises `RequestError`."""
    if not isinstance(given, Mapping):
        names = [known.name for known in dataclasses.fields(SamplingParams)]
        given = {name: getattr(given, name) for name in names if hasattr(given, name)}
    try:
        return SamplingParams(**{**given, "detokenize": False})
    except TypeError as error:
        raise RequestError(f"sampling parameters: {first_line(error)}") from error
