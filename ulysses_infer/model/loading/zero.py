"""DeepSpeed checkpoints as sources of weights: ZeRO stages 0 to 3, and universal checkpoints."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ulysses_infer.errors import CheckpointError, first_line
from ulysses_infer.model.loading.files import MemorySource, take
from ulysses_infer.parallel.layout import Span

POINTERS = ("latest", "latest_universal")  # files that name the folder of the last saved step
UNIVERSAL_WEIGHTS = "zero"  # the folder of a universal checkpoint with one folder per parameter


def zero_folder(folder: Path) -> Path | None:
    """The folder of one saved step: `folder` itself, or the one that its `latest` names; None if there is neither.

    Raises `CheckpointError` when `latest` names a step that is not there.
    """
    for pointer in POINTERS:
        if (folder / pointer).is_file():
            tag = (folder / pointer).read_text().strip()
            if not (folder / tag).is_dir():
                raise CheckpointError(f"{folder / pointer} names {tag!r}, but there is no such folder beside it")
            return folder / tag
    is_step = (folder / UNIVERSAL_WEIGHTS).is_dir() or any(folder.glob("*_model_states.pt"))
    return folder if is_step else None


def open_zero(folder: Path) -> ZeroSource:
    """The weights of the saved step in `folder`, in float32 where the optimizer keeps them so.

    DeepSpeed's files are pickles, which can run code when read: open only your own. Raises `CheckpointError`.
    """
    try:
        if (folder / UNIVERSAL_WEIGHTS).is_dir():
            return ZeroSource(_universal(folder))
        if any(folder.glob("*_optim_states.pt")):
            return ZeroSource(_partitioned(folder))
        return ZeroSource(_unpartitioned(folder))
    except (OSError, ValueError, LookupError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"the DeepSpeed checkpoint {folder} cannot be read: {first_line(error)}; it may be incomplete"
        ) from error


class ZeroSource(MemorySource):
    """Weights that are consolidated on read; tied weights appear under each of their names.

    The tensors have `shape` and `contiguous()`, and nothing else of a tensor.
    """

    def read(self, key: str, kept: tuple[int, list[Span]] | None) -> torch.Tensor:
        """The tensor, or the spans of one dimension, joined."""
        return take(self._tensors[key].contiguous(), kept)


def _partitioned(folder: Path) -> Mapping[str, Any]:
    """ZeRO 1 to 3: DeepSpeed's own consolidation, which for stage 3 joins a tensor only when it is used."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    progress = io.StringIO()  # DeepSpeed prints its progress
    with redirect_stdout(progress), redirect_stderr(progress):
        found: Mapping[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
            str(folder.parent), tag=folder.name, lazy_mode=True
        )
    return found


def _unpartitioned(folder: Path) -> Mapping[str, Any]:
    """ZeRO 0: the module's own state, saved by one rank."""
    files = sorted(folder.glob("*_model_states.pt"))
    if len(files) != 1:
        raise ValueError(f"its weights are in {len(files)} model-parallel parts, which only DeepSpeed can join")
    return _load(files[0])["module"]


@dataclass(frozen=True)
class _UniversalTensor:
    """One parameter of a universal checkpoint: a file with its values, flat or in shape, perhaps padded."""

    path: Path
    shape: tuple[int, ...]

    def contiguous(self) -> torch.Tensor:
        """The parameter, read now."""
        saved = _load(self.path)
        values: torch.Tensor = saved["param"] if isinstance(saved, dict) else saved
        return values.flatten()[: math.prod(self.shape)].view(self.shape)


def _universal(folder: Path) -> Mapping[str, Any]:
    """A universal checkpoint: one file per parameter; shapes and tied names are in the first model-states file."""
    files = sorted(folder.glob("*_model_states.pt"))
    if not files:
        raise ValueError("it has no *_model_states.pt, which holds the parameters' shapes")
    states = _load(files[0])
    shapes = states["param_shapes"]
    groups = [shapes] if isinstance(shapes, Mapping) else shapes
    tensors: dict[str, Any] = {
        name: _UniversalTensor(folder / UNIVERSAL_WEIGHTS / name / "fp32.pt", tuple(shape))
        for group in groups
        for name, shape in group.items()
    }
    lost = [name for name, tensor in tensors.items() if not tensor.path.is_file()]
    if lost:
        raise ValueError(f"{len(lost)} of its {len(tensors)} parameters have no file, first {lost[0]}")
    tensors |= {name: states["module"][name] for name in states["buffer_names"]}
    return tensors | {name: tensors[owner] for name, owner in states["shared_params"].items()}


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
