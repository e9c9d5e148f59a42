"""How a checkpoint stores quantized experts: one tensor per expert, or one for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ulysses_infer.model.quantization.scheme import Scheme

EXPERTS_MARK = "expert_scheme"  # attribute of experts modules whose weights are stored quantized


@dataclass(frozen=True)
class ExpertScheme:
    """The schemes of a layer's matrices: `gate_proj`, `up_proj` and `down_proj`, or `gate_up_proj` and `down_proj`.

    `suffixes` is of the latter, whose tensors hold all experts: what follows a matrix's name in the name of each of
    its components. The former has a tensor an expert, `{experts}.{number}.{matrix}.{component}`.
    """

    schemes: Mapping[str, Scheme]
    suffixes: Mapping[str, str] | None = None
    is_online: bool = False
    """Whether the matrices are made of dense weights while loading; no checkpoint has them."""
