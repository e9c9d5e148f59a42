"""DeepSpeed checkpoints as sources of weights: ZeRO stages 0 to 3, and universal checkpoints."""

from __future__ import annotations

import io
import math
import pickle
import re
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
ZERO_3_PREFIX = "zero_pp_rank_"  # of the model-states files of ZeRO 3, one per rank

READING_ERRORS = (
    *(OSError, ValueError, LookupError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError),
    *(ImportError, AttributeError),  # a pickle can name classes that are not installed here
)


def zero_folder(folder: Path) -> Path | None:
    """The folder of one saved step: `folder` itself, or the one that its `latest` names; None if there is neither.

    Raises `CheckpointError` when `latest` names a step that is not there.
    """
    for pointer in POINTERS:
        if (folder / pointer).is_file():
            tag = (folder / pointer).read_text(errors="replace").strip()
            if not tag or not (folder / tag).is_dir():
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
            tensors = _universal(folder)
        elif any(folder.glob("*_optim_states.pt")):
            tensors = _partitioned(folder)
        else:
            tensors = _unpartitioned(folder)
    except READING_ERRORS as error:
        raise CheckpointError(
            f"the DeepSpeed checkpoint {folder} cannot be read: {first_line(error)}; it may be incomplete"
        ) from error
    adapted = next((name for name in tensors if ".lora_A." in name), None)
    if adapted is not None:
        raise CheckpointError(
            f"the DeepSpeed checkpoint {folder} has LoRA adapters of PEFT, first {adapted}; save the adapter with "
            "save_pretrained and serve it by lora.adapters, or save the model after merge_and_unload"
        )
    return ZeroSource(tensors)


class ZeroSource(MemorySource):
    """Weights that are consolidated on read; tied weights appear under each of their names.

    The tensors have `shape` and `contiguous()`, and nothing else of a tensor.
    """

    def read(self, key: str, kept: tuple[int, list[Span]] | None) -> torch.Tensor:
        """The tensor, or the spans of one dimension, joined."""
        return take(self._tensors[key].contiguous(), kept)


def _partitioned(folder: Path) -> Mapping[str, Any]:
    """ZeRO 1 to 3: DeepSpeed's own consolidation, which for stage 3 joins a tensor only when it is used.

    DeepSpeed leaves out what no optimizer holds in ZeRO 1, and what is not frozen either in ZeRO 2.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    whole = _whole_module(folder)
    progress = io.StringIO()  # DeepSpeed prints its progress
    with redirect_stdout(progress), redirect_stderr(progress):
        found: Mapping[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
            str(folder.parent), tag=folder.name, lazy_mode=True
        )
    return {**whole, **found}


def _unpartitioned(folder: Path) -> Mapping[str, Any]:
    """ZeRO 0: the module's own state, saved by one rank."""
    return _whole_module(folder)


def _whole_module(folder: Path) -> Mapping[str, Any]:
    """The module's state, which ZeRO 0 to 2 save whole; empty for ZeRO 3, where each rank saves its part."""
    files = sorted(folder.glob("*_model_states.pt"))
    if any(file.name.startswith(ZERO_3_PREFIX) for file in files):
        return {}
    if not files:
        raise ValueError("it has no *_model_states.pt, which holds the module's state")
    if len(files) != 1:
        raise ValueError(f"its weights are in {len(files)} model-parallel parts, which only DeepSpeed can join")
    module: Mapping[str, Any] = _load(files[0])["module"]
    return {name: value for name, value in module.items() if isinstance(value, torch.Tensor)}


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
    """A universal checkpoint: one file per trained parameter; the model-states files have the rest."""
    files = sorted(folder.glob("*_model_states.pt"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])
    if not files:
        raise ValueError("it has no *_model_states.pt, which holds the parameters' shapes")
    states = _load(files[0])
    shapes = states["param_shapes"]
    groups = [shapes] if isinstance(shapes, Mapping) else shapes
    trained: dict[str, Any] = {
        name: _UniversalTensor(folder / UNIVERSAL_WEIGHTS / name / "fp32.pt", tuple(shape))
        for group in groups
        for name, shape in group.items()
    }
    lost = [name for name, tensor in trained.items() if not tensor.path.is_file()]
    if lost:
        raise ValueError(f"{len(lost)} of its {len(trained)} parameters have no file, first {lost[0]}")
    partitioned = files[0].name.startswith(ZERO_3_PREFIX)
    rest = _frozen(files) if partitioned else states["module"]
    tensors = {**rest, **{name: states["module"][name] for name in states["buffer_names"]}, **trained}
    shared = {name: tensors[owner] for name, owner in states["shared_params"].items() if owner in tensors}
    return {**tensors, **shared}


def _frozen(files: list[Path]) -> dict[str, torch.Tensor]:
    """The frozen parameters of ZeRO 3, joined from the fragments of all ranks, which `files` has in order."""
    states = [_load(file) for file in files]
    return {
        name: torch.cat([state["frozen_param_fragments"][name] for state in states])[: math.prod(shape)].view(shape)
        for name, shape in (states[0].get("frozen_param_shapes") or {}).items()
    }


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
