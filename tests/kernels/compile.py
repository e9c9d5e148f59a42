"""Compiles Triton kernels to cubins without a GPU and prints what each uses, one JSON object per line.

`python tests/kernels/compile.py [ARCHITECTURE ...]`, without TRITON_INTERPRET. `CASES` lists what is compiled.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kernels.expert_cases import expert_cases
from tests.kernels.index_cases import index_cases

ARCHITECTURES = (80, 90, 100)
FP8_ARCHITECTURES = (90, 100)


@dataclass(frozen=True)
class Case:
    """One kernel with the types of its arguments and the values of its constants."""

    name: str
    kernel: str
    """`module:function` below `ulysses_infer.kernels`."""
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    """Arguments that are divisible by 16; pointers are always."""
    architectures: tuple[int, ...] = ARCHITECTURES
    options: Mapping[str, Any] = field(default_factory=dict)


def pointers(dtype: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"*{dtype}")


def integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _norm(name: str, width: int, kind: int, add: bool = True, dtype: str = "bf16") -> Case:
    groups = max(1, 1 << (width // 128 - 1).bit_length())
    values = dtype if kind == 0 else "fp8e4nv"
    return Case(
        f"{name} {dtype} {width}",
        "norm:rms_norm_kernel",
        {
            **pointers(dtype, "x", "residual", "weight", "out"),
            **pointers(values, "values"),
            **pointers(dtype if kind == 0 else "fp32", "scales"),
            **integers("x_stride", "scale_stride", "width"),
            "eps": "fp32",
        },
        {"GROUPS": groups, "ADD": add, "KIND": kind},
        num_warps=max(1, min(16, groups // 4)),
        aligned=("x_stride", "width"),
        architectures=ARCHITECTURES if kind == 0 else FP8_ARCHITECTURES,
    )


def _gated(name: str, kind: int) -> Case:
    rows = kind == 1
    strides = ("gate_row", "gate_shard", "up_row", "up_shard", "size", "width")
    return Case(
        name,
        "activation:gated_rows_kernel" if rows else "activation:gated_kernel",
        {
            **pointers("bf16", "gate", "up"),
            **pointers("fp8e4nv" if kind else "bf16", "values"),
            **pointers("fp32" if kind else "bf16", "scales"),
            **integers(*strides, *(() if rows else ("scale_stride",))),
        },
        {"GROUPS": 32 if rows else 8, "SILU": True, **({} if rows else {"KIND": kind})},
        num_warps=8 if rows else 4,
        aligned=strides,
        architectures=FP8_ARCHITECTURES if kind else ARCHITECTURES,
    )


def _heads(
    name: str,
    cache: str,
    norm: str,
    slots: bool,
    width: int = 128,
    rotated: int | None = None,
    pairs: bool = False,
    parts: int = 1,
) -> Case:
    rotated = width if rotated is None else rotated
    sources = [f"{x}_{y}" for x in ("query", "key", "value") for y in ("row", "shard")]
    targets = [f"{x}_out_{y}" for x in ("query", "key", "value") for y in ("row", "shard")]
    heads = ("query_heads", "kv_heads", "query_source", "kv_source", "query_target", "kv_target")
    return Case(
        name,
        "heads:heads_kernel",
        {
            **pointers("bf16", "query", "key", "value", "query_weight", "key_weight"),
            **pointers("fp32" if pairs else "bf16", "cosine", "sine"),
            **pointers("i64", "query_index", "index", "slots", "positions"),
            **pointers("bf16", "query_out"),
            **pointers(cache, "key_out", "value_out"),
            **dict.fromkeys(("query_eps", "key_eps", "key_scale", "value_scale", "temperature_strength"), "fp32"),
            **integers("temperature_length", "cosine_row", "query_part", *sources, *targets, *heads),
        },
        {
            "WIDTH": width,
            "ROTATED": rotated,
            "HALF": 1 << (max(rotated // 2, 1) - 1).bit_length(),
            "REST": 1 << (max(width - rotated, 1) - 1).bit_length(),
            "COLUMNS": 1 << (width - 1).bit_length(),
            "HEADS": 4,
            "QUERY_NORM": norm,
            "KEY_NORM": norm,
            "QUERY_INDEXED": not slots,
            "INDEXED": not slots,
            "SLOTS": slots,
            "PAIRS": pairs,
            "TEMPERATURE": rotated == 0,
            "PARTS": parts,
        },
        num_warps=2,
        aligned=("cosine_row", "query_part", *sources, *targets),
        architectures=FP8_ARCHITECTURES if cache.startswith("fp8") else ARCHITECTURES,
    )


def _store(cache: str) -> Case:
    strides = ("key_row", "key_head", "value_row", "value_head", "key_size", "value_size")
    return Case(
        f"cache store {cache}",
        "cache:store_kernel",
        {
            **pointers("bf16", "key", "value"),
            **pointers("i64", "slots"),
            **pointers(cache, "keys", "values"),
            **integers(*strides),
        },
        {"KEY_WIDTH": 128, "VALUE_WIDTH": 128, "TILE": 1024},
        aligned=strides,
        architectures=FP8_ARCHITECTURES if cache.startswith("fp8") else ARCHITECTURES,
    )


def _quantise(kind: str, groups: int, *strides: str) -> Case:
    names = ("x_stride", *strides, "width")
    return Case(
        f"quantise {kind}",
        f"quantisation:quantise_{kind}",
        {**pointers("bf16", "x"), **pointers("fp8e4nv", "values"), **pointers("fp32", "scales"), **integers(*names)},
        {"GROUPS": groups},
        aligned=("x_stride", "width"),
        architectures=FP8_ARCHITECTURES,
    )


PEERS = {"halves": "*i64", "flags": "*i64", "epochs": "*i64"}


def _ranks(number: int) -> dict[str, int]:
    peers = 1 << (number - 1).bit_length()
    return {"RANK": 1, "RANKS": number, "PEERS": peers, "HALF": 512 << 10, "PROGRAMS": 128}


def _sum(dtype: str, ranks: int) -> Case:
    return Case(
        f"sum {dtype}, {ranks} ranks",
        "collectives:sum_kernel",
        {**pointers(dtype, "partial"), **PEERS, **integers("size")},
        {**_ranks(ranks), "TILE": 1024},
        aligned=("size",),
    )


def _sum_add_norm(width: int, kind: int, ranks: int = 8, dtype: str = "bf16") -> Case:
    groups = 1 << (width // 128 - 1).bit_length()
    return Case(
        f"sum, add, norm {dtype} {width}, kind {kind}, {ranks} ranks",
        "collectives:sum_add_norm_kernel",
        {
            **pointers(dtype, "partial", "residual", "weight", "out"),
            **pointers("fp8e4nv" if kind else dtype, "values"),
            **pointers("fp32" if kind else dtype, "scales"),
            **PEERS,
            **integers("rows", "scale_stride", "width"),
            "eps": "fp32",
        },
        {**_ranks(ranks), "GROUPS": groups, "KIND": kind},
        num_warps=max(1, min(16, groups // 4)),
        aligned=("width",),
        architectures=FP8_ARCHITECTURES if kind else ARCHITECTURES,
    )


def _exchange(to_heads: bool) -> Case:
    strides = ("source_row", "source_rank", "out_row", "out_rank", "width")
    return Case(
        f"exchange, {'tokens to heads' if to_heads else 'heads to tokens'}",
        "collectives:exchange_kernel",
        {**pointers("bf16", "source", "out"), **PEERS, **integers("tokens", *strides)},
        {**_ranks(8), "TO_HEADS": to_heads, "TILE": 1024},
        aligned=strides,
    )


def _greetings() -> list[Case]:
    constants = {"RANK": 1, "RANKS": 8}
    return [
        Case("greet, 8 ranks", "peers:greet_kernel", {"halves": "*i64"}, constants),
        Case("greetings, 8 ranks", "peers:greetings_kernel", pointers("i64", "halves", "out"), {"RANKS": 8}),
    ]


def _draw(name: str, aligned: tuple[str, ...]) -> Case:
    return Case(
        name,
        "sampling:draw_kernel",
        {**pointers("fp32", "weights"), "options": "*fp64", "tokens": "*i64", **integers("stride", "size")},
        {"ROWS": 16, "COLUMNS": 1024},
        num_warps=8,
        aligned=aligned,
    )


def _route(name: str, experts: int, top_k: int, sigmoid: bool) -> Case:
    """With the tokens scaled and packed if `sigmoid`."""
    sizes = ("num_tokens", "inputs", "num_experts", "x_row", "router_row", "weights_row", "experts_row", "hidden_row")
    return Case(
        name,
        "router:route_kernel",
        {
            **pointers("bf16", "x", "router", "logits_out", "hidden_out"),
            **pointers("fp32" if sigmoid else "bf16", "weights_out"),
            **pointers("i32", "experts_out"),
            **integers(*sizes),
        },
        {
            "SIGMOID": sigmoid,
            "NORMALISE": not sigmoid,
            "TOP_K": top_k,
            "COPY": sigmoid,
            "SCALE": sigmoid,
            "EXPERTS": experts,
            "TOKENS": 16,
            "DEPTH": min(256, max(32, 8192 // experts)),
        },
        num_warps=4 if experts <= 128 else 8,
        aligned=("inputs", "x_row", "router_row"),
    )


def _routing() -> list[Case]:
    sizes = integers("num_choices", "experts_row", "first", "own")
    pointed = {**pointers("i64", "counts", "tokens"), **pointers("i32", "experts", "offsets", "rows")}
    chosen = {**pointers("bf16", "logits", "weights_out"), **pointers("i32", "experts_out")}
    summed = {**pointers("bf16", "outputs", "weights", "added", "result"), "rows": "*i32"}
    rows = integers("logits_row", "weights_row", "experts_row", "num_experts")
    score = {"SIGMOID": False, "NORMALISE": True}

    def sum_case(name: str, top_k: int, weighted: bool) -> Case:
        return Case(
            name,
            "routing:sum_kernel",
            {**summed, **integers("output_row", "weights_row", "width")},
            {"TOP_K": top_k, "COLUMNS": 1024, "WEIGHTED": weighted, "INDEXED": weighted, "ADD": True, "WIDE": False},
            aligned=("output_row", "width"),
        )

    return [
        Case(
            "choose 8 of 128 experts",
            "router:choose_kernel",
            {**chosen, **rows},
            {**score, "TOP_K": 8, "EXPERTS": 128},
            num_warps=1,
        ),
        _route("route to 8 of 128 experts", 128, 8, False),
        _route("route to 10 of 256 experts", 256, 10, False),
        _route("route to 1 of 16 experts, scale, pack", 16, 1, True),
        Case("sort by expert", "routing:sort_kernel", {**pointed, **sizes}, {"TOP_K": 8, "CHOICES": 1024}),
        sum_case("sum of 8 experts", 8, True),
        sum_case("sum of the parts of 4 ranks", 4, False),
    ]


def _attention(
    name: str,
    group: int,
    lengths: int,
    width: int,
    cache: str = "bfloat16",
    model: str = "bfloat16",
    architectures: tuple[int, ...] = ARCHITECTURES,
    latents: bool = False,
    splits: int = 1,
    **options: Any,
) -> list[Case]:
    """The launches of 2 sequences of `lengths` query tokens and 2 KV heads, recorded on device meta."""
    import torch

    from ulysses_infer.kernels import attention, launch

    def empty(*shape: int, dtype: str = "int32") -> Any:
        return torch.empty(*shape, dtype=getattr(torch, dtype), device="meta")

    heads = 1 if latents else 2
    query, keys = empty(2 * lengths, heads * group, width, dtype=model), empty(64, 16, heads, width, dtype=cache)
    values = keys[..., :512] if latents else empty(64, 16, heads, width, dtype=cache)
    sequences = attention.Sequences(empty(3), empty(2), empty(2, 32), lengths, 512)
    for per_head in ("sinks", "alibi"):
        if options.pop(per_head, False):
            options[per_head] = empty(heads * group, dtype="float32")
    if extent := options.pop("extent", 0):  # with sinks of each token
        options["relative"] = empty(2 * lengths, heads * group, extent, dtype=model)
        options["sinks"] = empty(2 * lengths, heads * group, dtype=model)
    softmax = attention.Softmax(0.1, **options)
    cases: list[Case] = []

    def record(
        kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any
    ) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        cases.append(
            Case(
                f"{name}: {kernel.__name__}",
                f"attention:{kernel.__name__}",
                {argument: _type_of(value) for argument, value in given.items()},
                constants,
                num_warps,
                num_stages,
                tuple(k for k, v in given.items() if isinstance(v, int) and v % 16 == 0),
                architectures,
            )
        )

    original, attention.launch = attention.launch, record
    with launch.assume("meta", (min(architectures) // 10, 0)):
        attention.attention(query, keys, values, sequences, softmax, splits)
    attention.launch = original
    return cases


def _type_of(argument: Any) -> str:
    """The type of a kernel's argument as signatures name it."""
    if isinstance(argument, int | float):
        return "i32" if isinstance(argument, int) else "fp32"
    names = {
        "bfloat16": "bf16",
        "float16": "fp16",
        "float32": "fp32",
        "uint8": "u8",
        "int8": "i8",
        "int32": "i32",
        "int64": "i64",
    }
    return "*" + names[str(argument.dtype).removeprefix("torch.")]


CASES: list[Case] = [
    _norm("add, norm", 8192, 0),
    _norm("norm", 5120, 0, add=False),
    _norm("add, norm", 2048, 0, dtype="fp32"),
    _norm("add, norm", 16384, 0),
    _norm("add, norm, row scale", 8192, 1),
    _norm("add, norm, group scales", 5120, 2),
    _gated("gated", 0),
    _gated("gated, row scale", 1),
    _gated("gated, group scales", 2),
    _quantise("rows", 32),
    _quantise("groups", 8, "scale_stride"),
    _heads("rotary, cache write", "bf16", "", slots=True),
    _heads("head norm, rotary, cache write", "bf16", "before", slots=True),
    _heads("head norm, rotary, FP8 cache write", "fp8e4nv", "before", slots=True),
    _heads("head norm, rotary of a part, pack", "bf16", "before", slots=False, width=256, rotated=64),
    _heads("head norm, rotary, pack from halves", "bf16", "before", slots=False, parts=2),
    _heads("rotary of neighbours, head norm, cache write", "bf16", "after", slots=True, pairs=True),
    _heads("rotary of neighbours, head norm, pack", "bf16", "after", slots=False, pairs=True),
    _heads("temperature, cache write", "bf16", "", slots=True, rotated=0),
    _store("bf16"),
    _store("fp8e4nv"),
    _sum("bf16", 8),
    _sum("fp32", 3),
    _sum_add_norm(8192, 0),
    _sum_add_norm(16384, 0),
    _sum_add_norm(8192, 1),
    _sum_add_norm(5120, 2),
    _sum_add_norm(2048, 0, ranks=2, dtype="fp32"),
    _exchange(to_heads=True),
    _exchange(to_heads=False),
    *_greetings(),
    _draw("draw from 151936", ("stride", "size")),
    _draw("draw from 32003", ()),
    *_routing(),
    *_attention("decode 8 x 128", 8, 1, 128, splits=4),
    *_attention("decode 8 x 128, e4m3", 8, 1, 128, "float8_e4m3fn", architectures=FP8_ARCHITECTURES),
    *_attention("decode 8 x 128, e4m3 bits", 8, 1, 128, "float8_e4m3fn", architectures=(80,)),
    *_attention("decode 5 x 80, e5m2", 5, 1, 80, "float8_e5m2"),
    *_attention("prefill 8 x 128", 8, 512, 128),
    *_attention("prefill 8 x 128, e4m3", 8, 512, 128, "float8_e4m3fn", architectures=FP8_ARCHITECTURES),
    *_attention("prefill 8 x 128, e4m3 bits", 8, 512, 128, "float8_e4m3fn", architectures=(80,)),
    *_attention("prefill 8 x 64, all", 8, 512, 64, window=128, chunk=8192, softcap=30.0, sinks=True, alibi=True),
    *_attention("decode 1 x 128, ALiBi", 1, 1, 128, splits=4, alibi=True),
    *_attention("prefill 8 x 128, ALiBi", 8, 512, 128, alibi=True),
    *_attention("decode 8 x 128, relative", 8, 1, 128, splits=4, extent=1024),
    *_attention("prefill 8 x 128, relative", 8, 512, 128, extent=1024),
    *_attention("prefill 2 x 256, window, cap", 2, 512, 256, window=4096, softcap=50.0),
    *_attention("prefill 1 x 192", 1, 512, 192),
    *_attention("prefill 8 x 512", 8, 512, 512),
    *_attention("decode 8 x 512", 8, 1, 512),
    *_attention("decode 4 x 256", 4, 1, 256),
    *_attention("decode 4 x 128, float32", 4, 1, 128, "float32", "float32"),
    *_attention("prefill 4 x 256, float32", 4, 512, 256, "float32", "float32"),
    *_attention("decode 16 x 576, latents", 16, 1, 576, latents=True, splits=4),
    *_attention("prefill 4 x 96, float16 cache", 4, 512, 96, "float16", "float16"),
    *_attention("mixed 1 x 128, e4m3 bits", 1, 64, 128, "float8_e4m3fn", architectures=(80,)),
    *_attention("decode 16 x 576, latents, e4m3", 16, 1, 576, "float8_e4m3fn", latents=True, architectures=(90, 100)),
    *_attention("prefill 2 x 256, e4m3", 2, 512, 256, "float8_e4m3fn", architectures=(90, 100)),
    *_attention("prefill 2 x 256, e4m3 bits", 2, 512, 256, "float8_e4m3fn", architectures=(80,)),
    *_attention("decode 128 x 576, latents", 128, 1, 576, latents=True),
    *_attention("decode 128 x 576, latents, e4m3", 128, 1, 576, "float8_e4m3fn", latents=True, architectures=(90, 100)),
    *_attention(
        "decode 128 x 576, latents, e4m3 bits", 128, 1, 576, "float8_e4m3fn", latents=True, architectures=(80,)
    ),
    *expert_cases(Case, _type_of),
    *index_cases(Case, _type_of),
]


def compile_case(case: Case, architecture: int) -> dict[str, Any]:
    """Compile one case and read what it uses from its cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = case.kernel.split(":")
    kernel = getattr(importlib.import_module(f"ulysses_infer.kernels.{module}"), function)
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name in case.aligned or signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, dict(case.constants), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    used = resources(compiled.asm["cubin"])
    return {"name": case.name, "sm": architecture, **used, "shared": compiled.metadata.shared}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes of stack and local memory, which are 0 if nothing is spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def main() -> None:
    """Compile all cases for the architectures given, or for all."""
    wanted = [int(argument) for argument in sys.argv[1:]] or ARCHITECTURES
    for case in CASES:
        for architecture in case.architectures:
            if architecture in wanted:
                print(json.dumps(compile_case(case, architecture)), flush=True)


if __name__ == "__main__":
    main()
