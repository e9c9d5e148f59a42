"""LoRA adapters that are loaded and dropped between steps, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ulysses_infer.engine.engine import Engine
from ulysses_infer.errors import RequestError
from ulysses_infer.model.loading.files import resolve_folder
from ulysses_infer.model.lora.adapter import Adapter, adapter_bytes, read_adapter
from ulysses_infer.model.lora.attach import attach_adapter, check_adapter, detach_adapters
from ulysses_infer.worker.rank import Rank


class NewAdapter(NamedTuple):
    """An adapter that all ranks are about to load."""

    name: str
    folder: str
    number: int
    """Its number in step plans."""
    num_bytes: int


def announce_adapter(engine: Engine, name: str, path: str, replace: bool) -> NewAdapter:
    """On rank 0: find an adapter, by its path or hub id. Raises `RequestError` or `CheckpointError` if it cannot be
    served."""
    if name == engine.config.served_model_name:
        raise RequestError(f"{name!r} is the model's own name; give the adapter another")
    folder = resolve_folder(path, None)
    num_bytes = adapter_bytes(folder)
    number = engine.requests.adapters.next_number(name, num_bytes, replace)
    return NewAdapter(name, str(folder), number, num_bytes)


def load_adapter(rank: Rank, name: str, folder: str, number: int) -> None:
    """Load an adapter as `number` of step plans. Collective; nothing changes unless all ranks can.

    Raises `CheckpointError`.
    """
    model = rank.worker.model

    def read() -> Adapter:
        found = read_adapter(name, Path(folder))
        check_adapter(model.injection, found)
        return found

    adapter = rank.channel.together(read)
    rank.channel.together(lambda: attach_adapter(model.injection, adapter, number, model.dtype, rank.worker.device))
    model.bind_again()


def drop_adapters(rank: Rank, numbers: Sequence[int]) -> None:
    """Free the weights of adapters that no request uses."""
    detach_adapters(rank.worker.model.injection, numbers)
    rank.worker.model.bind_again()
