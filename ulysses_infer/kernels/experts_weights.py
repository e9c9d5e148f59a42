"""The weights of one matrix of all experts, as `experts.py` reads them. Does not need Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Values = Literal["float", "integer", "e2m1"]
Packed = Literal["", "inputs", "outputs"]


@dataclass(frozen=True)
class StoredExperts:
    """A slice of the matrices [E, outputs, inputs] of E experts: views of what a checkpoint stores.

    All tensors are viewed with their dimensions in the order (expert, output, input), whatever their order in memory.
    A tensor with `step` features per index (a block, a packed word) has the indices that cover the slice, so the slice
    may begin within the first index. `first_output` and `first_input` count from the start of the whole layer.
    """

    codes: torch.Tensor
    """Stored values; packed into words along one dimension, or not."""
    outputs: int
    inputs: int
    first_output: int = 0
    first_input: int = 0
    values: Values = "float"
    """What codes are: numbers of the tensor's dtype, unsigned integers from which the zero point is subtracted, or
    four bits of e2m1."""
    packed: Packed = ""
    bits: int = 0
    """Per value in a word; the first value in the lowest bits."""
    interleaved: bool = False
    """Words of eight values along the outputs, AWQ's: the even ones in the lower half, the odd ones in the upper."""
    scales: torch.Tensor | None = None
    """float32, bfloat16, or uint8 for exponents of two with bias 127. A dimension of size 1 covers all features of the
    slice."""
    scale_outputs: int = 1
    """Outputs per scale."""
    group_size: int = 0
    """Inputs per scale and zero point; 0: all of the slice."""
    zeros: torch.Tensor | None = None
    """Zero points: integers, packed along the outputs like the codes of AWQ, or bfloat16, laid out like the scales.
    None: `zero` for all."""
    zero: int = 0
    """The zero point, or what is added to stored ones."""
    groups: torch.Tensor | None = None
    """[E, inputs] int32: the group of each input; None: consecutive inputs."""

    def __post_init__(self) -> None:
        """One group for all inputs needs no group size."""
        if self.groups is None and (self.scales is None or self.scales.shape[2] == 1):
            object.__setattr__(self, "group_size", 0)

    @property
    def per_word(self) -> int:
        """Values per word of the codes."""
        return self.codes.element_size() * 8 // self.bits if self.packed else 1

    @property
    def zeros_per_word(self) -> int:
        """Zero points per word, or 1."""
        return 1 if self.zeros is None or self.zeros.is_floating_point() else 32 // self.bits

    @property
    def has_uneven_groups(self) -> bool:
        """Whether inputs may have to look up their scales one by one."""
        return self.groups is not None or bool(self.group_size & (self.group_size - 1))
