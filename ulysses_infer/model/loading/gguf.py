"""GGUF files, the format of llama.cpp: converted once to a Hugging Face folder, which all ranks then map."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ulysses_infer.cache_folders import cache_folder
from ulysses_infer.errors import CheckpointError, kind_and_line
from ulysses_infer.extras import require_extra

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
STORED = {"float32": torch.float32, "float16": torch.float16}
"""The dtype that a conversion stores, by `model.dtype`; otherwise bfloat16."""


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` names: itself, or the only one of a folder without config.json; None if there is none.

    Raises `CheckpointError` if there are several.
    """
    if path.suffix.lower() == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(each for each in path.iterdir() if each.suffix.lower() == SUFFIX)
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise CheckpointError(f"{path} has {len(found)} GGUF files ({names}); give one of them as model.path")
    return found[0] if found else None


def converted(file: Path, dtype: str) -> Path:
    """The Hugging Face folder of `file`, with its tokenizer and chat template, in the user's cache.

    dtype: `model.dtype`. transformers dequantises the weights. Raises `CheckpointError` for what it cannot read, and
    `ConfigError` if the package gguf is not installed.
    """
    require_extra("a GGUF file", "gguf")
    stat, stored = file.stat(), STORED.get(dtype, torch.bfloat16)
    identity = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {stored}"
    folder = cache_folder("gguf") / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        logger.info("converting %s to %s, once", file, folder)
        _convert(file, stored, folder)
    return folder


def _convert(file: Path, dtype: torch.dtype, folder: Path) -> None:
    """Write `folder`, whole or not at all; another process may do the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _write(*_read(file, dtype), made)
        with contextlib.suppress(OSError):  # another process was faster
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    """What `save_pretrained` would write, which refuses models that come from GGUF."""
    from huggingface_hub import save_torch_model

    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # Of tied embeddings, the input's is what other checkpoints keep.
    save_torch_model(model, str(folder), shared_tensors_to_discard=list(model.all_tied_weights_keys))
    for part in (model.config, model.generation_config, tokenizer):
        part.save_pretrained(folder)


def _read(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and the tokenizer in `file`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # transformers and gguf raise errors of every kind for what they do not know
        raise CheckpointError(
            f"{file} cannot be read: {kind_and_line(error)}; give a safetensors checkpoint"
        ) from error
