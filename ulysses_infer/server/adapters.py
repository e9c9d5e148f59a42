"""Commands for LoRA adapters, run by rank 0 between steps. The names and meanings are those of vLLM's routes."""

from __future__ import annotations

from typing import Any

from ulysses_infer.engine.engine import Engine
from ulysses_infer.errors import CheckpointError, RequestError
from ulysses_infer.job.adapters import announce_adapter, drop_adapters, load_adapter
from ulysses_infer.server.calls import call_all_ranks


class AdapterCommands:
    """Loads and unloads adapters while requests run."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._adapters = engine, engine.requests.adapters

    def load_lora_adapter(self, lora_name: str, lora_path: str, load_inplace: bool = False) -> dict[str, Any]:
        """Serve an adapter from a folder or hub id. load_inplace: it may replace the one of this name; running
        requests go on with the old one."""
        self._drop_unused()
        try:
            new = announce_adapter(self._engine, lora_name, lora_path, load_inplace)
        except CheckpointError as error:
            raise RequestError(str(error)) from error
        call_all_ranks(self._engine, load_adapter, new.name, new.folder, new.number)
        self._adapters.add(new.name, new.num_bytes)
        self._drop_unused()
        return {"lora_name": lora_name}

    def unload_lora_adapter(self, lora_name: str) -> dict[str, Any]:
        """Refuse new requests with the adapter. Its memory is free once those that run have ended."""
        self._adapters.remove(lora_name)
        self._drop_unused()
        return {"lora_name": lora_name}

    def _drop_unused(self) -> None:
        unused = self._engine.requests.take_unused_adapters()
        if unused:
            call_all_ranks(self._engine, drop_adapters, unused)
