"""Checkpoint files: opened lazily, read whole or by slices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ulysses_infer.errors import CheckpointError, first_line
from ulysses_infer.parallel.layout import Span

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]


class TensorSource(Protocol):
    """Named tensors that can be read whole or in part."""

    def keys(self) -> Iterable[str]:
        """Names of all tensors."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor `key`."""

    def read(self, key: str, kept: tuple[int, list[Span]] | None) -> torch.Tensor:
        """The tensor `key`, or the spans of one dimension of it, joined."""


def take(tensor: torch.Tensor, kept: tuple[int, list[Span]] | None) -> torch.Tensor:
    """`tensor`, or the spans of one dimension of it, joined; a view if one span is all of it."""
    if kept is None:
        return tensor
    dimension, spans = kept
    parts = [tensor.narrow(dimension, span.start, span.size) for span in spans or [Span(0, 0)]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dimension)


class SafetensorsSource:
    """The safetensors files of one checkpoint folder. Whole tensors are memory-mapped, slices are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, Any] = {}
        for path in checkpoint_files(folder):
            handle = _open(path)
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def keys(self) -> Iterable[str]:
        """Names as the checkpoint has them."""
        return self._handles.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the whole tensor; nothing is read."""
        return tuple(self._handles[key].get_slice(key).get_shape())

    def read(self, key: str, kept: tuple[int, list[Span]] | None) -> torch.Tensor:
        """The tensor, or the spans of one dimension, joined; only those bytes are read."""
        handle = self._handles[key]
        if kept is None:
            tensor: torch.Tensor = handle.get_tensor(key)
            return tensor
        dimension, spans = kept
        lazy = handle.get_slice(key)
        if [Span(0, lazy.get_shape()[dimension])] == spans:
            whole: torch.Tensor = handle.get_tensor(key)
            return whole
        prefix = (slice(None),) * dimension
        parts = [lazy[(*prefix, slice(span.start, span.stop))] for span in spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dimension)


class MemorySource:
    """The tensors of a model in memory. Slices are views; nothing is copied unless necessary."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def keys(self) -> Iterable[str]:
        """Parameter names of the model."""
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return tuple(self._tensors[key].shape)

    def read(self, key: str, kept: tuple[int, list[Span]] | None) -> torch.Tensor:
        """The tensor, or the spans of one dimension, joined."""
        return take(self._tensors[key].detach(), kept)


def resolve_folder(path: str, revision: str | None) -> Path:
    """The local folder of a checkpoint: `path` itself, or a download of this hub id.

    Raises `CheckpointError` with one line if it is neither.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise CheckpointError(f"model.path {path!r} is no folder and no hub id (owner/name); check the spelling")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"model.path {path!r} is no local folder and could not be had from the hub ({reason}); "
            "give a folder, or check the name, your access and the network"
        ) from error


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of `folder`, by its index if it has one. Raises `CheckpointError` for missing ones."""
    index = folder / INDEX_NAME
    if not index.is_file():
        if (folder / SINGLE_NAME).is_file():
            return [folder / SINGLE_NAME]
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; it has {others[0]}: save it again with save_pretrained" if others else ""
        raise CheckpointError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")
    names = sorted(set(_read_index(index).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} files of its index, first {missing[0]}; download it again"
        )
    return [folder / name for name in names]


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error}); download it again") from error
    return weight_map


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it may be truncated: download it again") from error
