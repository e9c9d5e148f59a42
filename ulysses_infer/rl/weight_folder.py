"""New weights on their way to the ranks of a server on the same host: tensors in files, of which ranks read slices."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from ulysses_infer.model.loading.files import INDEX_NAME

SHARD_BYTES = 2**30


class WeightFolder:
    """A temporary folder of safetensors files, as `update_weights` reads it; on exit it is removed.

    Tensors are copied at once, so their memory may be reused, and written whenever `shard_bytes` have come together.
    `TMPDIR=/dev/shm` keeps the files in memory.
    """

    def __init__(self, shard_bytes: int = SHARD_BYTES) -> None:
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._file_of: dict[str, str] = {}
        self.path = Path(tempfile.mkdtemp(prefix="ulysses_infer_weights_"))

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Copy one whole tensor of the model under its name in transformers."""
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if sum(each.nbytes for each in self._pending.values()) >= self._shard_bytes:
            self._flush()

    def finish(self) -> str:
        """Write the last tensors and the index; returns the path."""
        self._flush()
        (self.path / INDEX_NAME).write_text(json.dumps({"weight_map": self._file_of}))
        return str(self.path)

    def _flush(self) -> None:
        file = f"model-{len(set(self._file_of.values())):05}.safetensors"
        save_file(self._pending, self.path / file)
        self._file_of |= dict.fromkeys(self._pending, file)
        self._pending = {}

    def remove(self) -> None:
        """Delete the folder."""
        self._pending = {}
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> WeightFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()
