"""The trainer's end of a transfer of weights to a server (`job/weight_transfer.py`)."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ulysses_infer.errors import RequestError, kind_and_line
from ulysses_infer.job.weight_transfer import TRAINER, connect


class WeightSender:
    """Sends a trainer's weights to a running server, on which requests are paused meanwhile.

    url: of the server; admin_api_key: its `server.admin_api_key`; address, port: of this process, for the ranks of the
    server. On GPUs the tensors travel by NCCL, otherwise by gloo. Raises `RequestError` if the server refuses.
    """

    def __init__(
        self,
        url: str,
        admin_api_key: str,
        port: int,
        address: str = "127.0.0.1",
        device: torch.device | str = "cpu",
        timeout: float = 300.0,
    ) -> None:
        self._url, self._key, self._device, self._timeout = (
            url.rstrip("/"),
            admin_api_key,
            torch.device(device),
            timeout,
        )
        world_size = 1 + self._call("GET", "/get_world_size")["world_size"]
        info = {"master_address": address, "master_port": port, "world_size": world_size, "timeout": timeout}
        joining = _Beside(lambda: self._call("POST", "/init_weight_transfer_engine", {"init_info": info}))
        self._group = connect(address, port, TRAINER, world_size, self._device, timeout)
        joining.result()

    def send(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        version: str | None = None,
        mode: str = "keep",
        clear_cache: bool = True,
    ) -> None:
        """Replace the server's weights: pause, send, resume.

        named_tensors: all weights of the model under transformers' names. version: the tag of outputs from then on.
        mode, clear_cache: as of the server's /pause; by default running requests are kept, and their cache is computed
        again with the new weights.
        """
        tensors = [(name, tensor.detach()) for name, tensor in named_tensors]
        self._call("POST", f"/pause?mode={mode}&clear_cache={str(clear_cache).lower()}")
        try:
            self._call("POST", "/start_weight_update")
            self._broadcast(tensors)
            self._call("POST", "/finish_weight_update", {"weight_version": version})
        finally:
            self._call("POST", "/resume")

    def _broadcast(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        info = {
            "names": [name for name, _ in tensors],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
        }
        receiving = _Beside(lambda: self._call("POST", "/update_weights", {"update_info": info}))
        for _, tensor in tensors:
            self._group.broadcast(tensor.to(self._device).contiguous(), TRAINER).wait()
        receiving.result()

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise RequestError(f"{path}: {json.load(error)['error']['message']}") from error
        except OSError as error:
            raise RequestError(f"{self._url}{path} cannot be reached: {kind_and_line(error)}") from error


class _Beside:
    """A call in a thread of its own, while this one takes part in what it waits for."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._error: RequestError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except RequestError as error:
            self._error = error

    def result(self) -> None:
        """Wait for the end of the call. Raises its `RequestError`."""
        self._thread.join()
        if self._error is not None:
            raise self._error
