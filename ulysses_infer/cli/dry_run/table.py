"""The table that a dry run prints."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.cache.budget import TAKEN_BYTES
from ulysses_infer.cli.dry_run.report import DryRun
from ulysses_infer.config.speculation import HEADS
from ulysses_infer.job.draft_model import LoadedDraft
from ulysses_infer.parallel.head_layout import HeadLayout
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.parallel.symmetric_memory import SMALL_BYTES
from ulysses_infer.worker.graphs.launch_counter import StepLaunches

GIB = 1 << 30
LINE_WIDTH = 120
ASIDE = ("captured ", "attention runs on")
"""Beginnings of log lines that the table has elsewhere."""


class Section(NamedTuple):
    """A titled part of the table: rows of cells."""

    title: str
    rows: Sequence[Sequence[str]]


def render(run: DryRun) -> str:
    """The whole table as text."""
    return "\n".join(line for section in sections(run) for line in _lines(section)) + "\n"


def sections(run: DryRun) -> Iterator[Section]:
    """The parts of the table, in order."""
    yield Section("model", list(_model(run)))
    yield Section("memory per rank", list(_memory(run)))
    yield Section("attention", list(_attention(run)))
    yield Section("collectives", list(_collectives(run)))
    yield Section("CUDA graphs", list(_graphs(run)))
    yield Section("launches", list(_launches(run)))
    yield Section("kernels of a layer of the smallest decode", list(_kernels(run)))
    yield Section("prefill", list(_prefill(run)))
    notes = [message for message in dict.fromkeys(run.log) if not message.startswith(ASIDE)]
    yield Section("log of the start", [[note] for note in notes])


def _lines(section: Section) -> Iterator[str]:
    """Columns are as wide as their longest cell; the last one is free."""
    yield section.title
    columns = max((len(row) for row in section.rows), default=0)
    widths = [
        max(len(row[column]) for row in section.rows if len(row) > column + 1 or column == 0)
        for column in range(columns - 1)
    ]
    for row in section.rows:
        start = "".join(f"  {cell.ljust(width)}" for cell, width in zip(row[:-1], widths, strict=False)) + "  "
        wrapped = textwrap.wrap(row[-1], LINE_WIDTH - len(start)) or [""]
        yield (start + wrapped[0]).rstrip()
        yield from (" " * len(start) + line for line in wrapped[1:])
    yield ""


def _model(run: DryRun) -> Iterator[Sequence[str]]:
    shape, parallel, model = run.rank.model.shape, run.config.parallel, run.rank.model
    kind, world_size = type(model.module).__name__, parallel.world_size
    yield "architecture", f"{kind}: {shape.num_layers} layers, hidden size {shape.hidden_size}"
    yield "GPUs", f"{world_size} x {run.gpu.name}, {_gib(run.gpu.memory)}, sm_{''.join(map(str, run.gpu.capability))}"
    yield "modes", ", ".join(str(mode) for mode in parallel.available_modes) + f"; base {parallel.base}"
    policy = run.config.policy
    threshold = f" at {policy.threshold_tokens} tokens" if policy.name == "threshold" else ""
    yield "policy", f"{policy.name}{threshold}"
    kinds = Counter(heads._replace(source=None) for heads in shape.layers if heads is not None)
    for heads, count in kinds.items():
        where = f"in {count} layers, keys {heads.key_width} wide: " if len(kinds) > 1 else ""
        yield "heads", where + _heads(heads.on(parallel.layout))
    if readers := [heads for heads in shape.layers if heads is not None and heads.source is not None]:
        yield "shared", f"{len(readers)} layers read the keys and values of another and cache none"
    if layers := model.injection.expert_layers:
        yield "experts", f"{layers[0].num_experts} in {len(layers)} layers, placed by {layers[0].placement}"
    if run.rank.draft is not None:
        yield "draft model", _draft(run.rank.draft)
    if run.config.speculation.method in HEADS:
        yield "draft head", "not counted: its weights and its part of each block are not in config.json"
    read, kept = len(list(run.checkpoint.open().keys())), len(list(model.module.parameters()))
    yield "load plan", f"{read} tensors of a checkpoint -> {kept} parameters of a rank, none missing"


def _draft(draft: LoadedDraft) -> str:
    model = draft.loaded.model
    ranks = "all ranks" if draft.groups.layout.world_size > 1 else "the first rank"
    return f"{type(model.module).__name__}: {model.shape.num_layers} layers, on {ranks}"


def _heads(heads: HeadLayout) -> str:
    copies = heads.world_size * heads.key_value_slots // heads.num_key_value_heads
    stored = f"each KV head on {copies} ranks" if copies > 1 else "no KV head twice"
    return (
        f"{heads.num_attention_heads} query and {heads.num_key_value_heads} KV; per rank {heads.query_slots} and "
        f"{heads.key_value_slots}, {'padding included' if heads.is_padded else stored}"
    )


def _memory(run: DryRun) -> Iterator[Sequence[str]]:
    budget, cache, shape = run.rank.budget, run.rank.worker.cache, run.rank.model.shape
    share = run.config.cache.memory_utilization
    yield "GPU", _gib(run.gpu.memory), f"of which {_gib(TAKEN_BYTES)} are assumed to be taken by driver, CUDA and NCCL"
    yield "to use", _gib(budget.available), f"cache.memory_utilization {share:g}"
    yield "weights", _gib(budget.weights), ""
    yield "activations", _gib(budget.activations), f"of a step of {run.config.scheduler.max_num_batched_tokens} tokens"
    if budget.draft:
        yield "draft model", _gib(budget.draft), "weights, activations and a cache of as many tokens"
    tokens = cache.num_blocks * cache.shape.block_size
    yield (
        "KV cache",
        _gib(cache.num_bytes),
        f"{tokens:,} tokens of {str(cache.shape.dtype).removeprefix('torch.')} in blocks of {cache.shape.block_size}; "
        f"{tokens / shape.max_model_len:.1f} requests of {shape.max_model_len:,} tokens",
    )
    states = run.rank.worker.states
    if states is not None:
        yield (
            "states",
            _gib(states.num_bytes),
            f"of recurrent layers: {states.num_bytes_per_slot:,} bytes per request, for {states.num_sequences} "
            f"requests and {states.num_snapshots} snapshots",
        )
    if budget.offload:
        yield "copies", _gib(budget.offload), "a buffer between the cache and host memory"
    taken = budget.draft + budget.offload + cache.num_bytes + (0 if states is None else states.num_bytes)
    rest = run.gpu.memory - TAKEN_BYTES - budget.weights - budget.activations - taken
    yield "rest", _gib(rest), f"CUDA graphs take about {_gib(run.graph_bytes)} of it"
    yield from _tier(run)


def _tier(run: DryRun) -> Iterator[Sequence[str]]:
    """What evicted blocks take besides the GPU's memory."""
    sizes, block_size = run.rank.tier, run.rank.worker.cache.shape.block_size
    if sizes is None:
        return
    yield "host", _gib(sizes.host_bytes), f"pinned, for {sizes.host_slots[0] * block_size:,} tokens of evicted blocks"
    if sizes.disk_bytes:
        yield "disk", _gib(sizes.disk_bytes), f"for {sizes.disk_slots[0] * block_size:,} tokens more"


def _attention(run: DryRun) -> Iterator[Sequence[str]]:
    kinds = Counter(_kind(options.span) for options in run.rank.model.attention_options if options is not None)
    for kind, count in kinds.items():
        yield kind, f"{count} layers", run.attention.name
    for name, reason in run.attention.rejected.items():
        yield "not", name, reason
    if run.attention.name not in ("triton", "torch"):
        yield "note", "launches", "counted with triton instead"


def _kind(span: AttentionSpan) -> str:
    if span.sliding_window is not None:
        return f"window of {span.sliding_window}"
    return "full" if span.chunk_size is None else f"chunks of {span.chunk_size}"


def _collectives(run: DryRun) -> Iterator[Sequence[str]]:
    chosen, shape = run.config.runtime.collectives, run.rank.model.shape
    if run.config.parallel.world_size == 1:
        yield ("none: a single rank",)
        return
    if chosen == "torch":
        yield ("NCCL", "all messages: runtime.collectives is torch")
        return
    row = shape.hidden_size * run.rank.model.dtype.itemsize
    condition = "if the GPUs can address each other's memory" if chosen == "auto" else "required"
    yield "symmetric memory", f"messages up to {SMALL_BYTES >> 10} KiB, {condition}"
    yield "NCCL", "larger messages, and all if there is no symmetric memory"
    yield "all-reduce", f"{row / 1024:g} KiB a row: up to {SMALL_BYTES // row} rows are small"


def _graphs(run: DryRun) -> Iterator[Sequence[str]]:
    if not run.buckets:
        reason = "runtime.enforce_eager is true" if run.config.runtime.enforce_eager else "see the log of the start"
        yield "none", reason
        return
    for mode, sizes in run.buckets.items():
        yield str(mode), f"decode steps of {', '.join(map(str, sizes))} rows"
        if mixed := run.mixed_sizes.get(mode):
            yield "", f"other steps of {', '.join(map(str, mixed))} tokens"
    largest = max(sizes[-1] for sizes in run.buckets.values())
    prompts = max((sizes[-1] for sizes in run.mixed_sizes.values()), default=0)
    larger = f"steps with prompt tokens, if more than {prompts}" if prompts else "steps with prompt tokens"
    yield "not", f"steps with LoRA adapters, {larger}, decode steps of more than {largest} rows"


def _launches(run: DryRun) -> Iterator[Sequence[str]]:
    yield "step", "mode", "kernels per layer", "in all", "exchanges per layer"
    for mode, decodes in run.decodes.items():
        if isinstance(decodes, str):
            yield "decode", str(mode), decodes
            continue
        for rows in sorted({min(decodes), max(decodes)}):
            yield _row(f"decode of {rows} rows", mode, decodes[rows])
    for mode, prefill in run.prefills.items():
        title = f"prefill of {run.prefill_tokens} tokens"
        yield (title, str(mode), prefill) if isinstance(prefill, str) else _row(title, mode, prefill)


def _row(title: str, mode: Mode, step: StepLaunches) -> Sequence[str]:
    kinds = " + ".join(kind for kind in step.exchanges if kind != "all-gather")  # which only the head needs
    each = (f"{step.kernels_per_layer:.4g}", f"{step.exchanges_per_layer:.4g} {kinds}".rstrip())
    kernels, exchanges = each if len(step.marks) > 1 else ("-", "-")
    return title, str(mode), kernels, str(step.kernels.total()), exchanges


def _kernels(run: DryRun) -> Iterator[Sequence[str]]:
    for mode, decodes in run.decodes.items():
        if isinstance(decodes, str) or len(decodes[min(decodes)].marks) < 2:
            continue
        counts = decodes[min(decodes)].of_a_layer.most_common()
        yield str(mode), ", ".join(f"{count} {name}" for name, count in counts)


def _prefill(run: DryRun) -> Iterator[Sequence[str]]:
    longest, tokens = run.rank.model.shape.max_model_len, run.prefill_tokens
    for mode in run.config.parallel.available_modes:
        yield str(mode), f"{tokens} tokens a step, {ceil_div(tokens, mode.sp)} on each rank"
    yield "longest", f"{longest} tokens in {ceil_div(longest, tokens)} steps"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
