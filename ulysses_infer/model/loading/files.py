"""Checkpoint files: opened lazily, read whole or by slices."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ulysses_infer.errors import CheckpointError, first_line
from ulysses_infer.parallel.layout import Span

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
NAMED_KEY = "transformers_weights"  # of config.json: the file of the weights, if it has another name
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
        raise CheckpointError(f"model.path {path!r} is neither a folder nor a hub id (owner/name); check the spelling")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"model.path {path!r} is not a local folder and could not be loaded from the hub ({reason}); "
            "give a folder, or check the name, your access and the network"
        ) from error


def weights_file(folder: Path) -> Path | None:
    """The file or index that transformers loads: what config.json names, else the single file, else the index.

    transformers leaves a stale index beside a single file. None if `folder` has none. Raises `CheckpointError`.
    """
    named = _named_file(folder)
    if named is not None:
        return named
    return next((folder / name for name in (SINGLE_NAME, INDEX_NAME) if (folder / name).is_file()), None)


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of `folder`: one, or the shards of its index. Raises `CheckpointError` for missing ones."""
    found = weights_file(folder)
    if found is None:
        others = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
        hint = f"; it has {others[0]}: save it again with save_pretrained" if others else ""
        raise CheckpointError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")
    if found.name.endswith(".safetensors"):
        return [found]
    names = _shards(found)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} files of its index, first {missing[0]}; download it again"
        )
    return [folder / name for name in names]


def _named_file(folder: Path) -> Path | None:
    """The file or index that config.json names as `transformers_weights`, which must be in `folder`."""
    config = folder / "config.json"
    name = read_json_object(config).get(NAMED_KEY) if config.is_file() else None
    if name is None:
        return None
    path = folder / str(name)
    is_inside = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))  # a link may lead out of it
    if not (is_inside and path.is_file() and path.name.endswith((".safetensors", ".safetensors.index.json"))):
        raise CheckpointError(
            f"{config}: {NAMED_KEY} is {name!r}, which is not a safetensors file or index in this folder"
        )
    return path


def _shards(index: Path) -> list[str]:
    weight_map = read_json_object(index).get("weight_map")
    if not (isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())):
        raise CheckpointError(f"{index} is not a safetensors index (it maps no tensors to files); download it again")
    return sorted(set(weight_map.values()))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Raises `CheckpointError`, one line that names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}; correct it or download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} cannot be read: it holds no JSON object; correct it or download it again")
    return values


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it may be truncated: download it again") from error
