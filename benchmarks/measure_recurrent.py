"""The inner part of a recurrent layer, from its projections in to its projection out: C kernels against transformers.

    python -m benchmarks.measure_recurrent [--repeats 8] [--output FILE]

One layer of each kind with random weights in bfloat16, on one thread. Both sides run a decode of one and of eight
sequences and a prompt of 512 tokens; the table has the least CPU time of each in milliseconds, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from benchmarks.arguments import common_options
from ulysses_infer.cache.states import StateCache, StateSequences
from ulysses_infer.config import ModelConfig
from ulysses_infer.console.library_logging import quiet_libraries
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.model.recurrent.layer import RecurrentLayer
from ulysses_infer.model.recurrent.runs import Run, runs_of
from ulysses_infer.parallel.layout import Layout, Mode

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DELTA = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gated delta net, 8 heads of 128 x 128": (
        "qwen3_next",
        {
            **DELTA,
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 8,
            "layer_types": ["linear_attention"],
            "num_experts": 0,
            "mlp_only_layers": [0],
        },
    ),
    "Kimi delta attention, 8 heads of 128 x 128": (
        "kimi_linear",
        {
            "linear_num_heads": 8,
            "linear_head_dim": 128,
            "layer_types": ["linear_attention"],
            "mlp_layer_types": ["dense"],
        },
    ),
    "Mamba 2, 16 heads of 64 x 128": (
        "bamba",
        {
            "mamba_n_heads": 16,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "mamba_expand": 4,
            "attn_layer_indices": [],
        },
    ),
    "short convolution, 1024 channels": ("lfm2", {"hidden_size": 1024, "layer_types": ["conv"]}),
}
CASES = ((1, 1), (8, 1), (1, 512))
"""Sequences, and tokens of each."""


def make_layer(model_type: str, sizes: dict[str, Any]) -> RecurrentLayer:
    """The only layer of a random model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    place = Layout(Mode(1, 1)), 0, torch.device("cpu")
    (layer,) = ModelBuilder.from_pretrained(model, ModelConfig("unused"), *place).load().injection.recurrent_layers
    assert isinstance(layer, RecurrentLayer)
    return layer


@torch.inference_mode()
def cpu_seconds(layer: RecurrentLayer, sequences: int, length: int, repeats: int) -> tuple[float, float]:
    """The least CPU time of transformers' forward and of the C kernel."""
    assert layer.native is not None, "no C compiler"
    cache = StateCache(layer.state_shapes, sequences, torch.device("cpu"))
    cache.clear(torch.arange(sequences))
    run: Run = runs_of(StateSequences(torch.arange(sequences), [length] * sequences))[0]
    inputs = [torch.randn(sequences * length, width).bfloat16() for width in layer.own_widths]
    theirs, ours = [], []
    for _ in range(repeats if length > 1 else 10 * repeats):
        started = time.process_time()
        layer.run_inner(cache, run, inputs)
        between = time.process_time()
        layer.native(cache, layer.module.layer_idx, run, inputs)
        theirs.append(between - started)
        ours.append(time.process_time() - between)
    return min(theirs), min(ours)


def main() -> None:
    """Measure all kinds."""
    options = argparse.ArgumentParser(
        description=__doc__,
        parents=[common_options(repeats=8, output=None)],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    quiet_libraries(rank=0)
    torch.set_num_threads(1)
    rows = []
    print(f"{'':44}{'sequences':>10}{'tokens':>8}{'transformers':>14}{'ours':>9}{'ratio':>8}")
    for name, (model_type, sizes) in KINDS.items():
        layer = make_layer(model_type, sizes)
        for sequences, length in CASES:
            theirs, ours = cpu_seconds(layer, sequences, length, options.repeats)
            print(
                f"{name:44}{sequences:10}{length:8}{theirs * 1e3:14.3f}{ours * 1e3:9.3f}{theirs / ours:8.1f}",
                flush=True,
            )
            rows.append({"kind": name, "sequences": sequences, "tokens": length, "theirs": theirs, "ours": ours})
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
