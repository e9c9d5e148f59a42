"""Launches of the experts' kernel at real sizes, recorded on device `meta`, for `compile.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ulysses_infer.model.quantization.float_zeros import FloatZeroWeight
from ulysses_infer.model.quantization.mxfp4 import Mxfp4Weight
from ulysses_infer.model.quantization.packed import AwqWeight, CompressedWeight, GptqWeight
from ulysses_infer.model.quantization.scaled import ScaledWeight, TransposedScaledWeight
from ulysses_infer.parallel.layout import Span

HIDDEN, WIDTH, EXPERTS = 2048, 768, 128
"""Of Qwen3-30B-A3B."""
SCHEMES: dict[str, Any] = {
    "FP8 block": ScaledWeight("scale", "block", (128, 128)),
    "FP8 channel": ScaledWeight("scale", "channel"),
    "FP8 transposed": TransposedScaledWeight(),
    "int8": ScaledWeight("scale", "channel", dtype=torch.int8),
    "mxfp4": Mxfp4Weight(),
    "AWQ": AwqWeight(128),
    "GPTQ": GptqWeight(128),
    "GPTQ reordered": GptqWeight(128, 4, True),
    "int4": CompressedWeight(128),
    "int4 with zero points": CompressedWeight(32, 4, False),
    "int4 with float zero points": FloatZeroWeight(32),
    "8 bits in words": CompressedWeight(128, 8),
    "dense": None,
}
ROWS = {
    "decode": 8,
    "decode of a slice": 8,
    "32 rows": 4096,
    "64 rows": 8192,
    "prefill": 65536,
    "gated decode": 8,
    "gated 32 rows": 4096,
    "gated 64 rows": 8192,
}
BESIDE = {"gated beside dense": 8, "gated beside dense, 64 rows": 8192, "scattered": 8, "scattered, 64 rows": 8192}
"""Only of dense experts."""
HOPPER = (
    ("FP8 block", "decode"),
    ("FP8 block", "prefill"),
    ("FP8 transposed", "decode"),
    ("mxfp4", "32 rows"),
    ("mxfp4", "decode of a slice"),
    ("AWQ", "decode"),
    ("GPTQ", "prefill"),
    ("int4 with zero points", "decode"),
    ("int4 with float zero points", "decode"),
    ("dense", "prefill"),
    ("dense", "gated decode"),
    ("dense", "gated 64 rows"),
    ("FP8 block", "gated decode"),
    ("mxfp4", "gated 32 rows"),
    *(("dense", what) for what in BESIDE),
)
"""What is compiled for sm_90 by default; everything is for the others. `main` compiles everything."""


def stored_experts(name: str, dtype: torch.dtype, columns: Span) -> Any:
    """The matrices [HIDDEN, WIDTH] of a format in `SCHEMES` on device meta, and the slice `columns` of each."""
    from ulysses_infer.kernels.experts_weights import StoredExperts

    rows = Span(0, HIDDEN)
    if name == "dense":
        whole = torch.empty(EXPERTS, HIDDEN, WIDTH, dtype=dtype, device="meta")
        return StoredExperts(whole.narrow(2, columns.start, columns.size), HIDDEN, columns.size)
    parts: dict[str, torch.Tensor] = {}
    for part, component in SCHEMES[name].components(HIDDEN, WIDTH).items():
        stacked = component.stacked(EXPERTS)
        whole = torch.empty(stacked.shape, dtype=stacked.dtype, device="meta")
        parts[part] = stacked.view(whole, "row", [Span(0, WIDTH)], columns)
    return SCHEMES[name].stored_experts(parts, rows, columns)


def dense_product(dtype: torch.dtype, is_gated: bool) -> Any:
    """What a shared expert computes beside the others, on device meta."""
    from ulysses_infer.kernels.experts import DenseProduct

    x, weights = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((64, WIDTH), (1, HIDDEN, WIDTH)))
    return DenseProduct(x, weights, weights if is_gated else None)


def record(name: str, what: str, dtype: torch.dtype, architecture: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(kernel, arguments, options) of one launch."""
    from ulysses_infer.kernels import experts, launch

    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def keep(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        found.append((kernel, arguments, options))

    columns = Span(288, 384) if "slice" in what else Span(0, WIDTH)
    num_rows = {**ROWS, **BESIDE}[what]
    tokens = torch.empty(num_rows, columns.size, dtype=dtype, device="meta")
    offsets = torch.empty(EXPERTS, dtype=torch.int32, device="meta")
    index = torch.empty(num_rows, dtype=torch.int64, device="meta")
    original, experts.launch = experts.launch, keep
    try:
        with launch.assume("meta", (architecture // 10, architecture % 10)):
            stored = stored_experts(name, dtype, columns)
            beside = dense_product(dtype, "gated" in what) if what in BESIDE else None
            if "gated" in what:
                experts.gated_product(tokens, index, offsets, stored, stored, "silu", EXPERTS, beside)
            elif beside is not None:
                experts.down_product(tokens, index, offsets, stored, EXPERTS, beside)
            else:
                experts.grouped_product(tokens, offsets, stored)
    finally:
        experts.launch = original
    return found[0]


def expert_cases(make: Callable[..., Any], type_of: Callable[[Any], str]) -> Iterator[Any]:
    """The cases of all formats, each as steps of several sizes launch it."""
    for name in SCHEMES:
        for what in (*ROWS, *(BESIDE if name == "dense" else ())):
            if "gated" in what and "reordered" in name:
                continue  # inputs of gate and up are ordered differently
            for architecture in (80, 90, 100):
                if architecture != 90 or (name, what) in HOPPER:
                    yield expert_case(make, type_of, name, what, torch.bfloat16, architecture)
    for dtype in (torch.float16, torch.float32):
        yield expert_case(make, type_of, "dense", "prefill", dtype, 80)


def expert_case(
    make: Callable[..., Any], type_of: Callable[[Any], str], name: str, what: str, dtype: torch.dtype, architecture: int
) -> Any:
    """One case of one architecture."""
    kernel, arguments, options = record(name, what, dtype, architecture)
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    num_warps, num_stages = options.pop("num_warps"), options.pop("num_stages")
    fixed = {key: value for key, value in given.items() if value is None or (type(value) is int and value == 1)}
    return make(
        f"experts {name}, {what}, {str(dtype).removeprefix('torch.')}",
        f"experts_kernel:{kernel.__name__}",
        {key: type_of(value) for key, value in given.items() if key not in fixed},
        {**options, **fixed},
        num_warps,
        num_stages,
        tuple(key for key, value in given.items() if type(value) is int and value % 16 == 0),
        (architecture,),
    )
