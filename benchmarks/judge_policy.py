"""Quality of a policy's choices, step by step: `python -m benchmarks.judge_policy --random-model llama-60m --sp 2`.

Calibrates like a server, then draws random steps that calibration has not seen, measures each in every mode
(alternating the modes), and sums the time that each policy would take: every static mode, the adaptive policy, and the
best threshold in hindsight. All are compared with an oracle that always chooses the fastest mode. Under a launcher
(`deepspeed --num_gpus 2 benchmarks/judge_policy.py ...`) its ranks are used.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.arguments import common_options, launcher_options, model_options, model_path
from ulysses_infer import init_inference
from ulysses_infer.bench.load import LoadMeter
from ulysses_infer.engine.calibration_points import Limits, Point
from ulysses_infer.engine.engine import Engine
from ulysses_infer.engine.policies import AdaptivePolicy
from ulysses_infer.job.lifetime import end_with_launcher
from ulysses_infer.parallel.layout import Mode

CLEAR = 1.1  # a case is clear if the times of the modes differ by more than 10 %


class Judged(NamedTuple):
    """A step measured in every mode, and the mode that the policy would choose."""

    point: Point
    times: dict[Mode, float]
    chosen: Mode


def draw_points(count: int, limits: Limits, seed: int) -> list[Point]:
    """Steps as in serving: decodes only, prompts only, or both, with log-uniform sizes."""
    draw = random.Random(seed)

    def log_uniform(low: int, high: int) -> int:
        return round(math.exp(draw.uniform(math.log(low), math.log(max(low, high)))))

    points: list[Point] = []
    while len(points) < count:
        kind = draw.choice(("decodes", "prompt", "both"))
        context = log_uniform(16, limits.context)
        most = min(limits.num_sequences - 1, limits.num_tokens, limits.cached // context)
        decodes = 0 if kind == "prompt" else log_uniform(1, most)
        room = min(limits.num_tokens - decodes, limits.cached - decodes * context, limits.context)
        chunks: tuple[tuple[int, int], ...] = ()
        if kind != "decodes" and room >= 2:
            tokens = log_uniform(2, room)
            longest = min(limits.context, limits.cached - decodes * context) - tokens
            chunks = ((min(draw.choice((0, context)), longest), tokens),)
        if decodes or chunks:
            points.append(Point(decodes, context if decodes else 0, chunks))
    return points


def judge(engine: Engine, count: int, repeats: int, longest: float, seed: int, seconds: float) -> list[Judged]:
    """Measure `count` new steps in every mode, `repeats` times each, with the policy's choice for each."""
    policy = engine.policies.policy
    assert isinstance(policy, AdaptivePolicy)
    modes = engine.config.parallel.available_modes
    judged: list[Judged] = []
    with engine.policies.calibration() as calibration, calibration.prepared(seconds) as (limits, _):
        for point in draw_points(4 * count, limits, seed):
            predicted = dict(zip(modes, policy.model.predict(point.shape), strict=True))
            if len(judged) == count or max(predicted.values()) > longest:
                continue
            rounds = calibration.visit(point, repeats)
            times = {mode: median(times[mode] for times in rounds) for mode in modes}
            judged.append(Judged(point, times, min(predicted, key=predicted.__getitem__)))
    return judged


def best_threshold(judged: Sequence[Judged], base: Mode, shift: Mode) -> tuple[int, list[Mode]]:
    """The threshold with the lowest total log time over the steps, and the modes it selects."""

    def modes_for(threshold: int) -> list[Mode]:
        return [base if step.point.shape.num_tokens > threshold else shift for step in judged]

    def cost(threshold: int) -> float:
        return sum(math.log(step.times[mode]) for step, mode in zip(judged, modes_for(threshold), strict=True))

    best = min(sorted({0, *(step.point.shape.num_tokens for step in judged)}), key=cost)
    return best, modes_for(best)


def report(judged: Sequence[Judged], base: Mode, shift: Mode) -> Table:
    """One row per policy: time relative to the oracle's, total and mean, and correct choices in clear cases."""
    threshold, by_threshold = best_threshold(judged, base, shift)
    rows = {f"static sp{mode.sp}xtp{mode.tp}": [mode] * len(judged) for mode in judged[0].times}
    rows[f"threshold {threshold} (best in hindsight)"] = by_threshold
    rows["adaptive"] = [step.chosen for step in judged]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("policy", "all steps", "mean of steps", "worst step", "clear cases right"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for name, modes in rows.items():
        table.add_row(name, *score(judged, modes))
    return table


def score(judged: Sequence[Judged], modes: Sequence[Mode]) -> list[str]:
    """The cost of the choice `modes`, relative to the best mode of each step."""
    best = [min(step.times.values()) for step in judged]
    taken = [step.times[mode] for step, mode in zip(judged, modes, strict=True)]
    ratios = [own / least for own, least in zip(taken, best, strict=True)]
    clear = [
        step.times[mode] == min(step.times.values())
        for step, mode in zip(judged, modes, strict=True)
        if max(step.times.values()) > CLEAR * min(step.times.values())
    ]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return [
        f"{sum(taken) / sum(best):.3f}x",
        f"{mean:.3f}x",
        f"{max(ratios):.2f}x",
        f"{sum(clear)} of {len(clear)}",
    ]


def details(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Every step as JSON values."""
    return [
        {
            "decodes": step.point.decodes,
            "context": step.point.context,
            "chunks": step.point.chunks,
            "ms": {f"sp{mode.sp}xtp{mode.tp}": round(1e3 * took, 3) for mode, took in step.times.items()},
            "chosen": f"sp{step.chosen.sp}xtp{step.chosen.tp}",
        }
        for step in judged
    ]


def main() -> None:
    """Parse, run on every rank, print on rank 0."""
    end_with_launcher()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        parents=[model_options(), common_options(sp=2, tp=1, steps=60, repeats=5, output=None), launcher_options()],
    )
    parser.add_argument("--longest", type=float, default=2.0, help="leave out steps that take more seconds (default 2)")
    parser.add_argument("--calibration-seconds", type=float, default=30.0)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    path = model_path(options)
    policy = {"name": "adaptive", "profile": None, "calibration_seconds": options.calibration_seconds}
    scheduler = {"max_num_batched_tokens": options.max_num_batched_tokens, "max_num_seqs": 64}
    with init_inference(
        path,
        parallel={"sp": options.sp, "tp": options.tp},
        policy=policy,
        scheduler=scheduler,
        cache={"num_blocks": 4096},
    ) as engine:
        others = LoadMeter()
        judged = engine._on_rank_0(
            lambda own: judge(own, options.steps, options.repeats, options.longest, options.seed, 30.0)
        )
        if engine.is_first:
            layout = engine.config.parallel.layout
            console = Console()
            console.print(report(judged, layout.base, layout.shift))
            console.print(f"{len(judged)} steps; other programs kept {others.foreign_cores():.2f} cores busy")
            if options.output is not None:
                options.output.write_text(json.dumps(details(judged), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
