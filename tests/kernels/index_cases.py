"""The launches of an index (learned sparse attention) that `compile.py` compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def index_cases(case: Callable[..., Any], type_of: Callable[[Any], str]) -> list[Any]:
    """The sizes of DeepSeek-V3.2 and of GLM-5-Next, with pools, and odd ones. case: `compile.Case`."""
    return [
        *_cases(case, type_of, "index 64 x 128", 64, 128, 2048, "bfloat16"),
        *_cases(case, type_of, "index 32 x 128, pools of 16", 32, 128, 128, "bfloat16", 16),
        *_cases(case, type_of, "index 5 x 80, float32", 5, 80, 100, "float32"),
    ]


def _cases(
    case: Callable[..., Any],
    type_of: Callable[[Any], str],
    name: str,
    heads: int,
    width: int,
    top_k: int,
    dtype: str,
    pool: int = 1,
) -> list[Any]:
    """The launches for 16 tokens of 4 sequences, recorded on device meta."""
    import torch

    from ulysses_infer.kernels import index

    def empty(*shape: int, kind: str = "int32") -> Any:
        return torch.empty(*shape, dtype=getattr(torch, kind), device="meta")

    cases: list[Any] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        cases.append(
            case(
                f"{name}: {kernel.__name__}",
                f"index:{kernel.__name__}",
                {argument: type_of(value) for argument, value in given.items()},
                constants,
                num_warps,
                aligned=tuple(k for k, v in given.items() if isinstance(v, int) and v % 16 == 0),
            )
        )

    original, index.launch = index.launch, record
    query, weights = empty(16, heads, width, kind=dtype), empty(16, heads, kind="float32")
    sequences = empty(5), empty(4), empty(4, 512)
    index.top_slots(query, weights, empty(64, 16, 1, width, kind=dtype), *sequences, 8192, top_k, 0, pool)
    index.launch = original
    return cases
