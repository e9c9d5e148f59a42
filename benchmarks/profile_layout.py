"""Computation time of one rank of a layout per step, in every mode, measured alone on one device.

    python -m benchmarks.profile_layout configs/models/llama-3.3-70b.json --fp8 --output llama-70b-h200.json

Runs rank `--rank` of the layout `--sp` x `--tp` with random weights and without the other ranks: exchanges make their
copies but transfer nothing, so the times are those of the computation. Measures `--layers` layers and one layer, and
extrapolates the difference to the whole model. Prints a table; `--output` saves the figures as JSON, with a description
of the method.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from benchmarks.arguments import common_options
from ulysses_infer.attention.backend import KernelAttention
from ulysses_infer.cache.paged import PagedCache
from ulysses_infer.config import ModelConfig
from ulysses_infer.job.make_worker import make_attention
from ulysses_infer.model.experts import host_reads
from ulysses_infer.model.fusion.fuse import Fusion
from ulysses_infer.model.injection.probe import probe
from ulysses_infer.model.layers.rotary import freeze_rotary
from ulysses_infer.model.model import ModelBuilder, ShiftModel
from ulysses_infer.native.matmul import make_matmul
from ulysses_infer.parallel.groups import ProcessGroups
from ulysses_infer.parallel.layout import Layout, Mode
from ulysses_infer.parallel.null import NullProcessGroup, null_collectives
from ulysses_infer.worker.block_tables import BlockTables
from ulysses_infer.worker.graphs.cuda_graphs import CudaCapturer, CudaGraphRunner, wants_cuda_graphs
from ulysses_infer.worker.step_plan import LAST_LOGITS, PlanItem, StepPlan
from ulysses_infer.worker.worker import Worker

WARM_UP = 3
HOW = (
    "benchmarks/profile_layout.py: one rank alone, random weights, exchanges without traffic; seconds are medians; "
    "model_seconds = seconds per layer x layers of the model + the rest, from runs of 1 and of `layers` layers"
)


class Load(NamedTuple):
    """A step: `requests` of `tokens` new tokens each, after `context` earlier ones."""

    requests: int
    tokens: int
    context: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """A load in a mode: seconds of the step with the measured layers, and extrapolated to the whole model."""

    mode: str
    requests: int
    tokens: int
    context: int
    seconds: float
    model_seconds: float


class NoWeights:
    """A `TensorSource` without tensors."""

    def keys(self) -> Iterable[str]:
        """No keys."""
        return ()

    def shape(self, key: str) -> tuple[int, ...]:
        """Raises `KeyError`."""
        raise KeyError(key)

    def read(self, key: str, kept: Any) -> torch.Tensor:
        """Raises `KeyError`."""
        raise KeyError(key)


def build_model(config: Any, layout: Layout, rank: int, device: torch.device, max_model_len: int) -> ShiftModel:
    """The rank's share of a model with random weights on the device."""
    settings = ModelConfig(path="-", dtype="bfloat16", max_model_len=max_model_len)
    blueprint = ModelBuilder(config, NoWeights, settings, layout, layout.shard_of(rank), device)
    torch.manual_seed(rank)
    for module in blueprint.injection.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_random(name, parameter, device), requires_grad=False))
    blueprint.injection.model.to(device)
    freeze_rotary(blueprint.injection.model, blueprint.shape.max_model_len)
    model = ShiftModel(blueprint.injection, blueprint.shape, blueprint.dtype)
    probe(model)
    Fusion(model)
    return model


def _random(name: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Small random numbers around 0; scales are constant."""
    if "scale" in name:
        return torch.full(like.shape, 0.01, dtype=like.dtype, device=device)
    if not like.dtype.is_floating_point:
        return torch.zeros(like.shape, dtype=like.dtype, device=device)
    values = torch.empty(like.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
    return values.to(like.dtype)


def build_worker(model: ShiftModel, layout: Layout, rank: int, loads: list[Load], arguments: Any) -> Worker:
    """A worker with null process groups and a cache for the largest load."""
    device = next(model.module.parameters()).device
    groups = ProcessGroups(layout, rank, world=NullProcessGroup(layout.world_size, rank))
    for mode in layout.modes:
        groups.by_mode[mode] = null_collectives(groups.place(mode))
    shape = model.shape.cache_shape(groups.shard, layout, arguments.block_size, model.dtype)
    backend = make_attention(arguments.attention_backend, model, shape, device)
    captures = wants_cuda_graphs(None, device, backend, host_reads(model.injection.expert_layers, device))
    blocks = max(load.requests * shape.blocks_for(load.context + load.tokens) for load in loads)
    cache = PagedCache(shape, blocks, device, scratch_blocks=1)
    for pool in (*cache.keys, *cache.values):
        pool.normal_()
    most = max(load.requests for load in loads)
    tables = BlockTables(shape.block_size, most, shape.blocks_for(model.shape.max_model_len))
    matmul = make_matmul("auto", device)
    worker = Worker(model, cache, tables, groups, backend, matmul, device)
    if captures and isinstance(backend, KernelAttention):
        capturer = CudaCapturer(device)
        worker.graphs = CudaGraphRunner(model, cache, groups, backend, worker.eager.inputs, capturer, device, most)
    return worker


def make_plan(mode: Mode, load: Load, blocks_each: int, dropped: list[int]) -> StepPlan:
    """The step of `load`: every request has its own blocks, and its earlier tokens count as cached."""
    items = [
        PlanItem(index, load.context, load.tokens, [index * blocks_each + n for n in range(blocks_each)], LAST_LOGITS)
        for index in range(load.requests)
    ]
    return StepPlan(0, mode, items, np.ones(load.requests * load.tokens, dtype=np.int32), dropped, full_logits=False)


def measure(worker: Worker, mode: Mode, load: Load, repeats: int) -> float:
    """Median seconds of the step of `load`."""
    blocks_each = worker.cache.shape.blocks_for(load.context + load.tokens)
    times = []
    for _ in range(WARM_UP + repeats):
        plan = make_plan(mode, load, blocks_each, list(range(load.requests)))
        _synchronize(worker.device)
        started = time.perf_counter()
        worker.run(plan)
        _synchronize(worker.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times_of(num_layers: int, loads: list[Load], arguments: Any) -> Iterator[tuple[Mode, Load, float]]:
    """Seconds of every load in every mode on `num_layers` layers."""
    config = read_config(arguments.model, num_layers, arguments.fp8)
    layout = Layout(Mode(arguments.sp, arguments.tp))
    longest = max(load.context + load.tokens for load in loads)
    device = torch.device(arguments.device)
    model = build_model(config, layout, arguments.rank, device, longest)
    worker = build_worker(model, layout, arguments.rank, loads, arguments)
    for mode in layout.modes:
        for load in loads:
            yield mode, load, measure(worker, mode, load, arguments.repeats)


def read_config(path: Path, num_layers: int, fp8: bool) -> Any:
    """transformers' config of `path` with `num_layers` layers and, with `fp8`, block-scaled FP8 weights."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["num_hidden_layers"] = num_layers
    for name in ("layer_types", "mlp_only_layers"):
        if values.get(name):
            values[name] = values[name][:num_layers]
    if fp8:
        values["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "fmt": "e4m3",
        }
    return CONFIG_MAPPING[values["model_type"]](**values)


def profile(arguments: Any) -> list[Measured]:
    """Every load in every mode, extrapolated to the whole model."""
    loads = [
        *(Load(requests, 1, arguments.context) for requests in arguments.decodes),
        *(Load(1, tokens, 0) for tokens in arguments.prompts),
    ]
    whole = json.loads(arguments.model.read_text(encoding="utf-8"))["num_hidden_layers"]
    alone = {(mode, load): seconds for mode, load, seconds in times_of(1, loads, arguments)}
    measured = []
    for mode, load, seconds in times_of(arguments.layers, loads, arguments):
        per_layer = (seconds - alone[mode, load]) / (arguments.layers - 1)
        scaled = alone[mode, load] + (whole - 1) * per_layer
        measured.append(Measured(str(mode), *load, seconds, scaled))
    return measured


def save(measured: list[Measured], arguments: Any) -> None:
    """Write the figures with a description of the method."""
    on_gpu = arguments.device.startswith("cuda")
    values = {
        "how": HOW,
        "model": arguments.model.stem,
        "base": [arguments.sp, arguments.tp],
        "rank": arguments.rank,
        "layers": arguments.layers,
        "weights": "fp8, blocks of 128 x 128" if arguments.fp8 else "bfloat16",
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "repeats": arguments.repeats,
        "steps": [dataclasses.asdict(step) for step in measured],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common_options(sp=8, tp=1, context=4096, attention_backend="auto", repeats=10, output=None)],
    )
    parser.add_argument("model", type=Path, help="a config.json")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--layers", type=int, default=8, help="number of layers to run, at least 2")
    parser.add_argument("--fp8", action="store_true", help="weights in FP8 with one scale per block of 128 x 128")
    parser.add_argument(
        "--decodes", type=int, nargs="*", default=[1, 8, 32, 128, 256], help="numbers of requests of decode steps"
    )
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048, 8192], help="tokens of prompt steps")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.layers < 2:
        parser.error("--layers must be at least 2")
    measured = profile(arguments)
    print("| mode | requests | tokens each | context | ms | ms, whole model |\n|---|---|---|---|---|---|")
    for step in measured:
        times = f"{step.seconds * 1e3:.2f} | {step.model_seconds * 1e3:.1f}"
        print(f"| {step.mode} | {step.requests} | {step.tokens} | {step.context} | {times} |")
    if arguments.output is not None:
        save(measured, arguments)


if __name__ == "__main__":
    main()
