"""Fits the roofline constants of `ulysses_infer/planning/nodes/*.yaml` to measured tables of one device.

Run from the repository root: `python -m benchmarks.fit_hardware FOLDER`, where FOLDER has the tables of one GPU from
the repository ai-dynamo/aiconfigurator (Apache-2.0): gemm.parquet, context_attention.parquet,
generation_attention.parquet, nccl.parquet, custom_allreduce.parquet, moe.parquet, gated_delta_net.parquet. Needs
pyarrow, pandas and scipy. Prints the constants, each with its mean absolute percentage error on the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ulysses_infer.planning import roofline
from ulysses_infer.planning.roofline import Link, Rate

KERNELS = {
    "bf16": ("bfloat16", "torch.nn.functional.linear", 2.0, 2.0),
    "fp8": ("fp8", "CutlassFP8ScaledMMLinearKernel", 1.0, 1.0),
    "fp8_block": ("fp8_block", "DeepGemmFp8BlockScaledMMKernel", 1.0, 1.0),
}
"""By dtype of products: the table's dtype and kernel, bytes of weights and inputs."""
EXPERTS = {"bf16": ("bfloat16", 2.0), "fp8_block": ("fp8_block", 1.0)}


def main() -> None:
    """Print the constants as YAML with errors as comments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    _products(_table(folder, "gemm"))
    _experts(_table(folder, "moe"))
    _attention(_table(folder, "context_attention"), _table(folder, "generation_attention"))
    _recurrent(_table(folder, "gated_delta_net"))
    _collectives(_table(folder, "nccl"), _table(folder, "custom_allreduce"))


def _table(folder: Path, name: str) -> Any:
    import pandas

    table = pandas.read_parquet(folder / f"{name}.parquet")
    return table.assign(seconds=table["latency"] / 1e3)


def fit(predict: Callable[..., Any], start: list[float], seconds: np.ndarray) -> tuple[list[float], float]:
    """The positive parameters of `predict` with the least absolute log error, and their mean absolute error."""
    from scipy.optimize import least_squares

    def errors(logs: np.ndarray) -> np.ndarray:
        return np.log(predict(*np.exp(logs)) / seconds)

    found = least_squares(errors, np.log(start), loss="soft_l1", f_scale=0.1)
    predicted = predict(*np.exp(found.x))
    return np.exp(found.x).tolist(), float(np.mean(np.abs(predicted / seconds - 1)))


def _say(name: str, values: list[float], error: float, count: int) -> None:
    print(f"{name}: [{', '.join(f'{value:.4g}' for value in values)}]  # {error:.0%} over {count} rows", flush=True)


def _products(table: Any) -> None:
    print("products:")
    for dtype, (label, kernel, weight_bytes, input_bytes) in KERNELS.items():
        own = table[(table.gemm_dtype == label) & (table.kernel_source == kernel)]
        own = own[(own.n >= 512) & (own.k >= 512) & (own.m <= 16384)]
        m, n, k = (own[name].to_numpy(float) for name in "mnk")

        sizes = (m, n, k, weight_bytes, input_bytes)

        # The tables' FP8 products include the quantisation of their input, which the engine fuses into what precedes.
        def predict(flops: float, speed: float, floor: float, quantise: float = 0.0, sizes: Any = sizes) -> Any:
            return roofline.product_seconds(Rate(flops, speed, floor), *sizes) + quantise * sizes[0] * sizes[2]

        start = [1e15, 3e12, 5e-6] + [1e-12] * (dtype != "bf16")
        _say(f"  {dtype}", *fit(predict, start, own.seconds.to_numpy()), len(own))


def _experts(table: Any) -> None:
    print("experts:")
    for dtype, (label, weight_bytes) in EXPERTS.items():
        own = table[(table.moe_dtype == label) & (table.distribution == "balanced") & (table.moe_ep_size == 1)]
        own = own[own.num_tokens <= 16384]
        tokens, top = own.num_tokens.to_numpy(float), own.topk.to_numpy(float)
        width = own.inter_size.to_numpy(float) / own.moe_tp_size.to_numpy(float)
        used = roofline.experts_used(own.num_experts.to_numpy(float), top, tokens)
        sizes = (tokens * top, used, own.hidden_size.to_numpy(float), width, weight_bytes)

        def predict(flops: float, speed: float, floor: float, sizes: Any = sizes) -> Any:
            return roofline.experts_seconds(Rate(flops, speed, floor), *sizes)

        _say(f"  {dtype}", *fit(predict, [5e14, 3e12, 2e-5], own.seconds.to_numpy()), len(own))


def _attention(prefill: Any, decode: Any) -> None:
    own = prefill[(prefill.window_size == 0) & (prefill.kv_cache_dtype == "bfloat16") & (prefill.head_dim == 128)]
    own = own[own.isl >= 1024]
    pairs = (own.batch_size * own.isl * (own.isl + 1) / 2).to_numpy(float)
    heads = own.num_heads.to_numpy(float)

    def predict_prefill(flops: float, floor: float) -> Any:
        return roofline.prefill_attention_seconds(Rate(flops, np.inf, floor), heads, 128.0, pairs)

    _say("prefill_attention", *fit(predict_prefill, [5e14, 1e-5], own.seconds.to_numpy()), len(own))
    own = decode[(decode.window_size == 0) & (decode.kv_cache_dtype == "bfloat16") & (decode.head_dim == 128)]
    own = own[own.num_heads / own.num_key_value_heads <= 16]
    cached = (4 * own.batch_size * (own.step + 1) * own.num_key_value_heads * own.head_dim).to_numpy(float)

    def predict_decode(speed: float, floor: float) -> Any:
        return roofline.decode_attention_seconds(Rate(np.inf, speed, floor), cached)

    _say("decode_attention", *fit(predict_decode, [3e12, 1e-5], own.seconds.to_numpy()), len(own))


def _recurrent(table: Any) -> None:
    for phase, rate_name in (("context", "prefill_recurrent"), ("generation", "decode_recurrent")):
        own = table[(table.phase == phase) & (table.num_tokens <= 65536)]
        keys = ["batch_size", "seq_len", "num_k_heads", "num_v_heads", "d_model"]
        own = own.groupby(keys, as_index=False).seconds.sum()
        states = own.batch_size * own.num_v_heads * 128 * 128
        tokens = own.batch_size * own.seq_len if phase == "context" else own.batch_size
        moved = (8 * states).to_numpy(float) if phase == "generation" else np.zeros(len(own))
        work = (6 * tokens * own.num_v_heads * 128 * 128).to_numpy(float) if phase == "context" else np.zeros(len(own))

        def predict(
            speed: float, floor: float, sizes: Any = (work, moved), is_prefill: bool = phase == "context"
        ) -> Any:
            rate = Rate(speed, np.inf, floor) if is_prefill else Rate(np.inf, speed, floor)
            return rate.seconds(*sizes)

        _say(rate_name, *fit(predict, [1e14 if phase == "context" else 3e12, 1e-5], own.seconds.to_numpy()), len(own))


def _collectives(nccl: Any, custom: Any) -> None:
    for name in ("all_reduce", "alltoall", "all_gather"):
        print(f"{name}:")
        for ranks in (2, 4, 8):
            own = nccl[(nccl.op_name == name) & (nccl.num_gpus == ranks) & (nccl.nccl_dtype == "half")]
            _link(ranks, name, own, 2 * own.message_size.to_numpy(float))
    print("all_reduce_small:")
    for ranks in (2, 4, 8):
        own = custom[(custom.num_gpus == ranks) & (custom.backend == "vllm_graph") & (custom.message_size <= 1 << 25)]
        _link(ranks, "all_reduce", own, 2 * own.message_size.to_numpy(float))


def _link(ranks: int, name: str, own: Any, num_bytes: np.ndarray) -> None:
    formula = roofline.all_reduce_seconds if name == "all_reduce" else roofline.exchange_seconds

    def predict(latency: float, speed: float) -> Any:
        return formula(Link(latency, speed), ranks, num_bytes)

    _say(f"  {ranks}", *fit(predict, [1e-5, 2e11], own.seconds.to_numpy()), len(own))


if __name__ == "__main__":
    main()
