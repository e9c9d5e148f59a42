"""Small models, nodes and workloads for tests of planning."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from transformers import LlamaConfig

from benchmarks.judge_plan import LLAMA_8B
from tests.equivalence.swiftkv import swiftkv_config
from ulysses_infer.bench.serve.traces import TraceRow
from ulysses_infer.config import Config, ModelConfig, SchedulerConfig
from ulysses_infer.planning.node import Node, load_node
from ulysses_infer.planning.operations import Changes, StepOperations
from ulysses_infer.planning.planner import Planner
from ulysses_infer.planning.roofline import Link, Rate
from ulysses_infer.planning.sizes import ModelSizes, sizes_of

NO_HASH_IDS: st.SearchStrategy[tuple[int, ...]] = st.just(())


def llama_config(**changes: int) -> LlamaConfig:
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    return LlamaConfig(**{**sizes, **changes})


def swiftkv_sizes(own: int | None = 16, group: int = 1) -> ModelSizes:
    """Of Llama-3.1-SwiftKV-8B; own: layers that all tokens take, None: all; group: later layers that share keys."""
    return sizes_of(swiftkv_config(**LLAMA_8B, dtype="bfloat16", num_key_value_layers=own, key_value_group_size=group))


def llama_sizes(**changes: int) -> ModelSizes:
    return sizes_of(llama_config(**changes))


def config(**scheduler: int) -> Config:
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 512, **scheduler}
    return Config(model=ModelConfig(path="-"), scheduler=SchedulerConfig(**limits))


def planner(node: Node | None = None, sizes: ModelSizes | None = None) -> Planner:
    return Planner(sizes or llama_sizes(), node or load_node("8xh200"), config())


def operations(node: Node, sizes: ModelSizes | None = None) -> StepOperations:
    return StepOperations(sizes or llama_sizes(), node, "replicate", Changes())


def burst(count: int = 20, input_len: int = 300, output_len: int = 8) -> list[TraceRow]:
    return [TraceRow(0.001 * number, input_len, output_len) for number in range(count)]


def arrivals(
    longest_input: int, longest_output: int, most: int = 30, hash_ids: st.SearchStrategy[tuple[int, ...]] = NO_HASH_IDS
) -> st.SearchStrategy[list[TraceRow]]:
    """Requests of any lengths within a fifth of a second."""
    row = st.builds(
        TraceRow, st.floats(0, 0.2), st.integers(1, longest_input), st.integers(1, longest_output), hash_ids
    )
    return st.lists(row, min_size=1, max_size=most).map(lambda found: sorted(found, key=lambda row: row.at))


def faster(node: Node, part: str, factor: float) -> Node:
    """`node` with one kind of bandwidth or speed multiplied."""
    value = getattr(node, part)
    if isinstance(value, Rate):
        return replace(
            node, **{part: value._replace(flops=value.flops * factor, bytes_per_second=value.bytes_per_second * factor)}
        )
    changed = {
        key: Link(each.latency_seconds, each.bytes_per_second * factor)
        if isinstance(each, Link)
        else each._replace(flops=each.flops * factor, bytes_per_second=each.bytes_per_second * factor)
        for key, each in value.items()
    }
    return replace(node, **{part: changed})


def free_links(node: Node) -> Node:
    """`node` with collectives that take no time."""
    free = {ranks: Link(0.0, float("inf")) for ranks in (2, 4, 8)}
    return replace(node, **dict.fromkeys(("all_reduce", "all_reduce_small", "all_to_all", "all_gather"), free))
