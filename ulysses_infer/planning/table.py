"""Prints a plan in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table

from ulysses_infer.cache.budget import GIB
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.operations import Operation
from ulysses_infer.planning.planner import Evaluation, Plan
from ulysses_infer.planning.speculation import AssumedSpeculation, lone_draft
from ulysses_infer.planning.step_times import AnalyticStepTimes
from ulysses_infer.planning.workload import describe
from ulysses_infer.step_time.step_shape import StepShape

CONTEXT = 4096  # tokens of the explained decode, and of the explained prompt


def print_plan(console: Console, plan: Plan, price: float | None, max_num_seqs: int) -> None:
    """The table of candidates, the layouts that were left out, and the recommendation."""
    node, sizes = plan.node, plan.sizes
    console.print(f"{sizes.model_type}, {sizes.num_weights / 1e9:.1f} B weights, {sizes.dtype}")
    console.print(f"{plan.num_nodes} x {node.name}: {'; '.join(node.notes)}")
    console.print(describe(plan.rows))
    if plan.speculation is not None:
        console.print(f"speculation: {plan.speculation}")
    if plan.has_tier:
        console.print(f"evicted prefixes: {plan.layouts[0].tier / GIB:.1f} GiB of host memory and disk per rank")
    console.print(_table(plan, price, max_num_seqs))
    console.print("* on the Pareto front of median time to first token and time per token")
    for layout in plan.layouts:
        if layout.reason is not None:
            console.print(f"left out {layout}: {layout.reason}")
    for name, tokens in plan.crossovers.items():
        if tokens is not None:
            console.print(f"{name}: its base mode is faster than full tensor parallelism above {tokens} prompt tokens")
    console.print(f"recommended: {plan.best.candidate}")
    console.print(verdict(plan))
    used, replicas = plan.best.figures.num_replicas, plan.best.candidate.layout.dp
    if used < replicas:
        console.print(f"{used:,} of its {replicas:,} replicas got a request: fewer nodes would do for this traffic")


def _table(plan: Plan, price: float | None, max_num_seqs: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False)
    table.add_column("layout and policy", no_wrap=True)
    names = ["GiB/rank", "cache tokens", *["tier tokens", "cached", "loaded"] * plan.has_tier]
    names += ["TTFT p50", "p99", "TPOT p50", "p99", "E2E p50", "p99", "tok/s"]
    names += ["accepted"] * (plan.speculation is not None)
    names += ["goodput"] * bool(plan.targets) + ["modes"] + ["$/M tokens"] * (price is not None)
    for name in names:
        table.add_column(name, justify="left" if name == "modes" else "right", no_wrap=True)
    front = {id(evaluation) for evaluation in plan.pareto}
    for evaluation in plan.evaluations:
        table.add_row(*_row(plan, evaluation, id(evaluation) in front, price, max_num_seqs))
    return table


def _row(plan: Plan, evaluation: Evaluation, is_best: bool, price: float | None, max_num_seqs: int) -> list[str]:
    figures, layout = evaluation.figures, evaluation.candidate.layout
    cells = [f"{evaluation.candidate}{' *' if is_best else ''}", f"{layout.weights / GIB:.1f}"]
    cells.append(f"{layout.cache_tokens(max_num_seqs):,}")
    if plan.has_tier:
        cells += [f"{layout.tier_tokens:,}", f"{figures.cached_share:.1%}", f"{figures.loaded_share:.1%}"]
    for name in ("ttft", "tpot", "latency"):
        digits = 1 if name == "tpot" else 0
        cells += [f"{getattr(getattr(figures, name), key):,.{digits}f}" for key in ("p50", "p99")]
    cells.append(f"{figures.tokens_per_second:,.0f}")
    if plan.speculation is not None:
        cells.append(f"{figures.accepted_share:.0%} of {figures.num_drafted:,}")
    cells += [f"{figures.goodput:.1%}"] * bool(plan.targets)
    cells.append(", ".join(f"{mode} {share:.0%}" for mode, share in sorted(figures.mode_shares.items())))
    if price is not None:
        cells.append(f"{plan.cost(evaluation, price):.3f}")
    return cells


def verdict(plan: Plan) -> str:
    """What the best candidate reaches; if it misses targets, which of them binds."""
    figures = plan.best.figures
    if not plan.targets or figures.goodput >= 0.99:
        return f"mean latency {figures.latency.mean / 1e3:.2f} s, {figures.tokens_per_second:,.0f} tokens/s"
    misses = {name: getattr(figures, name).p99 / limit for name, limit in plan.targets.items() if limit > 0}
    worst = max(misses, key=misses.__getitem__)
    return (
        f"no layout meets the targets for 99 % of requests; the nearest meets them for {figures.goodput:.1%}. "
        f"{worst} binds: its p99 is {getattr(figures, worst).p99:,.0f} ms, the target {plan.targets[worst]:,.0f}"
    )


def print_explanation(
    console: Console, name: str, modes: Sequence[Mode], times: AnalyticStepTimes, speculation: AssumedSpeculation | None
) -> None:
    """The operations of a decode, without and with drafted tokens, and of a prompt, in each mode of a layout."""
    for mode in modes:
        decode = StepShape.of([CONTEXT], [])
        console.print(_operations(name, mode, f"one decode of {CONTEXT} tokens", times.explain(mode, decode)))
        if speculation is not None:
            _explain_drafts(console, name, mode, times, speculation)
        prompt = times.explain(mode, StepShape.of([], [(0, CONTEXT)]))
        console.print(_operations(name, mode, f"prompt of {CONTEXT} tokens", prompt))


def _explain_drafts(
    console: Console, name: str, mode: Mode, times: AnalyticStepTimes, speculation: AssumedSpeculation
) -> None:
    drafts = lone_draft(speculation, partial(times.seconds, mode, is_ahead=False), mode, CONTEXT)
    operations = times.explain(mode, StepShape.of([CONTEXT + place for place in range(drafts + 1)], []), is_ahead=False)
    expected = sum(speculation.acceptance**place for place in range(drafts + 1))
    title = f"one decode of {CONTEXT} tokens with {drafts} drafted ones, which gives {expected:.2f} tokens"
    console.print(_operations(name, mode, title, operations))


def _operations(name: str, mode: Mode, title: str, operations: Sequence[Operation]) -> Table:
    table = Table(title=f"{name}, mode {mode}: {title}", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("operation", "each, µs", "times", "ms", "share"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    total = sum(operation.total for operation in operations)
    for one in operations:
        share = one.total / max(total, 1e-12)
        each, all_of_them = f"{one.seconds * 1e6:.1f}", f"{one.total * 1e3:.2f}"
        table.add_row(one.name, each, str(one.times), all_of_them, f"{share:.0%}")
    table.add_row("total", "", "", f"{total * 1e3:.2f}", "")
    return table
