"""Names of checkpoint tensors that hold quantized experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ulysses_infer.model.experts.matrix import ExpertMatrix, matrices_of
from ulysses_infer.model.loading.files import TensorSource
from ulysses_infer.model.quantization.expert_scheme import EXPERTS_MARK, ExpertScheme

Rename = Callable[[str, dict[str, Any]], tuple[str, str | None]]  # (key, names known): (name, conversion's pattern)


class ExpertTensor(NamedTuple):
    """What a checkpoint tensor holds of quantized experts."""

    matrix: str
    """The full name of an `ExpertMatrix`."""
    leaf: str
    """The name of the tensor within the matrix: a component, if the matrix has one of this name."""
    expert: int | None
    """The expert's number; None: all experts."""


class ExpertKeys:
    """Finds and reads a checkpoint's tensors of quantized experts.

    A quantized tensor is where the dense weight of the same projection would be. So transformers' renamings and
    conversions decide where it belongs: `block_sparse_moe.experts.3.w1` has the same meaning for both.
    """

    def __init__(self, model: Any, positions: Mapping[str, int]) -> None:
        """positions: of each pattern that a conversion of transformers joins with others, which of them it is."""
        self._positions = positions
        self.matrices: dict[str, ExpertMatrix] = {}
        self._dense: dict[str, list[str]] = {}  # a dense weight's name: the matrices that are in its place
        self._suffixes: dict[str, str] = {}  # of tensors that hold all experts: the component's name
        for name, module in model.named_modules():
            found = {f"{name}.{child}": matrix for child, matrix in matrices_of(module).items()}
            if found and not getattr(module, EXPERTS_MARK).is_online:
                self.matrices |= found
                self._note(name, list(found), getattr(module, EXPERTS_MARK))

    def _note(self, experts: str, matrices: list[str], scheme: ExpertScheme) -> None:
        *ups, down = matrices
        self._dense[f"{experts}.gate_up_proj" if len(ups) == 2 else ups[0]] = ups
        self._dense[down] = [down]
        if scheme.suffixes is not None:
            self._suffixes |= {suffix: component for component, suffix in scheme.suffixes.items()}
            return
        for name in matrices:  # for families without a conversion
            count, leaf = self.matrices[name].num_experts, name.rpartition(".")[2]
            self._dense |= {f"{experts}.{expert}.{leaf}.weight": [name] for expert in range(count)}

    def find(self, key: str, rename: Rename) -> ExpertTensor | None:
        """What the tensor `key` holds of quantized experts; None for any other tensor."""
        if not self.matrices:
            return None
        stem, _, leaf = key.rpartition(".")
        owner, _, projection = stem.rpartition(".")
        number = owner.rpartition(".")[2]
        if number.isdigit() and projection:
            name, pattern = rename(f"{stem}.weight", self._dense)
            matrices = self._dense.get(name)
            if matrices is not None:
                position = self._positions[pattern] if pattern is not None and len(matrices) > 1 else 0
                return ExpertTensor(matrices[position], leaf, int(number))
        for suffix, component in self._suffixes.items():
            name, _ = rename(key.removesuffix(suffix), self._dense)
            if key.endswith(suffix) and name in self._dense:
                return ExpertTensor(self._dense[name][0], component, None)
        return None

    def check_foreign(self, found: ExpertTensor, source: TensorSource, key: str) -> None:
        """Raise `CheckpointError` if `key`, which no matrix uses, would change the result."""
        self.matrices[found.matrix].check_foreign(found.leaf, source, key)

    def read(self, name: str, source: TensorSource, keys: Mapping[int | None, str]) -> torch.Tensor:
        """This rank's part of parameter `name`, read from the tensors `keys` by expert. Raises `CheckpointError`."""
        matrix, _, leaf = name.rpartition(".")
        if None in keys:
            return self.matrices[matrix].read_merged(leaf, source, keys[None])
        return self.matrices[matrix].read(leaf, source, {e: key for e, key in keys.items() if e is not None})
