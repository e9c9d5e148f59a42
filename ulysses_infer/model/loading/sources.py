"""Finds the source of a model's weights: a folder, a hub id, or a model in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ulysses_infer.errors import CheckpointError, ConfigError
from ulysses_infer.model.loading.files import (
    MemorySource,
    SafetensorsSource,
    TensorSource,
    read_json_object,
    resolve_folder,
    take,
    weights_file,
)
from ulysses_infer.model.loading.gguf import converted, find_gguf
from ulysses_infer.model.loading.training import AdaptedSource, TrainingSource, has_adapters
from ulysses_infer.model.loading.zero import open_zero, zero_folder
from ulysses_infer.parallel.layout import Span

ADAPTER_CONFIG = "adapter_config.json"
LEVELS_ABOVE = 3  # a training run has its config.json at most this many levels above the folder of a step


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: a Hugging Face folder, or one that DeepSpeed saved while training."""

    folder: Path
    step: Path | None = None
    """The folder of the saved step, for a DeepSpeed checkpoint."""
    hf_config: str | None = None
    """The recipe's `model.hf_config`."""

    def open(self) -> TensorSource:
        """Its weights. Raises `CheckpointError`."""
        return SafetensorsSource(self.folder) if self.step is None else open_zero(self.step)

    @property
    def is_copied(self) -> bool:
        """Whether every rank copies tensors into its own memory instead of mapping the files."""
        return self.step is not None

    def find_files(self) -> Path:
        """The folder with the model's config.json, and its tokenizer if it has one. Raises `CheckpointError`."""
        if self.hf_config is not None:
            named = Path(self.hf_config).expanduser()
            return named.parent if named.is_file() else named
        if self.step is None:
            return self.folder
        nearest = self.step.resolve()
        for folder in (nearest, *nearest.parents[:LEVELS_ABOVE]):
            if (folder / "config.json").is_file():
                return folder
        raise CheckpointError(
            f"{self.folder} is a DeepSpeed checkpoint without the config.json of its model, in it or up to "
            f"{LEVELS_ABOVE} folders above; name a folder that has one (and a tokenizer) as model.hf_config"
        )


def find_checkpoint(
    path: str, revision: str | None = None, hf_config: str | None = None, dtype: str = "auto"
) -> Checkpoint:
    """The checkpoint that a hub id, a folder or a GGUF file names. dtype: the recipe's. Raises `CheckpointError`."""
    gguf = find_gguf(Path(path).expanduser())
    if gguf is not None:
        with unpartitioned():
            return Checkpoint(converted(gguf, dtype), None, hf_config)
    folder = resolve_folder(path, revision)
    if weights_file(folder):
        return Checkpoint(folder, None, hf_config)
    step = zero_folder(folder)
    if step is None and (folder / ADAPTER_CONFIG).is_file():
        base = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "its base model"
        raise CheckpointError(
            f"{folder} is an adapter of PEFT, not a model; serve {base} with lora.adapters.NAME={path}"
        )
    return Checkpoint(folder, step, hf_config)


@dataclass(frozen=True)
class GivenModel:
    """A `transformers.PreTrainedModel` in memory."""

    module: Any
    in_training: bool = False
    """Whether a DeepSpeed engine trains it: its weights then change in place, and may be partitioned."""
    sequence_parallel_size: int | None = None
    """Ranks that share a sequence in that training; None without training."""
    sequence_parallel_group: Any = None
    """This rank's process group of them; None if each rank has its own sequences."""

    @property
    def folder(self) -> Path | None:
        """The folder or hub cache it was loaded from, with its tokenizer; None if there is none."""
        from huggingface_hub import try_to_load_from_cache

        name = getattr(self.module, "name_or_path", "") or ""
        if name and Path(name).is_dir():
            return Path(name)
        cached = try_to_load_from_cache(name, "tokenizer_config.json") if name.count("/") == 1 else None
        return Path(cached).parent if isinstance(cached, str) else None

    @property
    def is_copied(self) -> bool:
        """Whether every rank gets copies of its tensors, not views."""
        return self.in_training or has_adapters(self.module)

    @property
    def default_base(self) -> dict[str, int]:
        """The default base mode: in a training job, SP over its sequence-parallel groups and TP over the rest."""
        if self.sequence_parallel_size is None:
            return {}
        import deepspeed.comm as comm

        sp = self.sequence_parallel_size
        return {"parallel.sp": sp, "parallel.tp": comm.get_world_size() // sp}

    def open(self) -> TensorSource:
        """Its weights: views for an ordinary model, copies for one in training. Raises `ConfigError`."""
        if has_adapters(self.module):
            return AdaptedSource(self.module)
        return TrainingSource(self.module) if self.in_training else MemorySource(self.module.state_dict())


def given_model(model: Any) -> GivenModel:
    """The model inside a DeepSpeed or data-parallel engine, or PEFT's wrapper. Raises `ConfigError`."""
    from transformers import PreTrainedModel

    inner = getattr(model, "module", model)
    base = _without_wrapper(inner) if hasattr(inner, "get_base_model") else inner
    if not isinstance(base, PreTrainedModel):
        found = type(model).__name__ + (f" of a {type(base).__name__}" if base is not model else "")
        raise ConfigError(f"model is a {found}; give a hub id, a folder or a transformers.PreTrainedModel")
    group = getattr(model, "seq_parallel_group", None)
    return GivenModel(base, inner is not model, getattr(model, "sequence_parallel_size", None), group)


def _without_wrapper(adapted: Any) -> Any:
    """The model into which PEFT has put adapters."""
    kind = adapted.active_peft_config.peft_type.value
    if kind != "LORA":
        raise ConfigError(f"the model is adapted with PEFT's {kind}; only LORA can be merged for serving")
    return adapted.get_base_model()


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Models created inside are whole, even in a ZeRO 3 job whose Trainer partitions every new model."""
    from transformers.integrations import deepspeed as integration

    if not integration.is_deepspeed_zero3_enabled():
        yield
        return
    reference: Any = integration._hf_deepspeed_config_weak_ref
    kept = reference()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(kept)


class ShapesOnly:
    """The tensors of another source without their values, to find out what a loader can make of them."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def keys(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._source.shape(key)

    def read(self, key: str, kept: tuple[int, list[Span]] | None) -> torch.Tensor:
        """A tensor with the shape of the other source's, on the meta device."""
        return take(torch.empty(self._source.shape(key), device="meta"), kept)


def open_weights(source: Any) -> TensorSource:
    """The weights of `source`: a folder or hub id, a model, an engine that trains one, or a state dict.

    Raises `CheckpointError` or `ConfigError`.
    """
    if isinstance(source, str | os.PathLike):
        return find_checkpoint(str(source)).open()
    if isinstance(source, Mapping):
        return MemorySource(source)
    return given_model(source).open()
