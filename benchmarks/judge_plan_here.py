"""Compares `ulysses-infer plan` with runs of the engine on this machine.

Run from the repository root on a quiet machine: `python -m benchmarks.judge_plan_here TRACE [--seconds 45]`. For each
model it calibrates two ranks as the adaptive policy does, serves the model, replays a slice of the trace at half of the
machine's capacity under each policy (static TP and SP, threshold, adaptive: `bench compare`'s servers and client), and
simulates the same requests with the measured profile. A second prediction takes the mean times of the steps that the
runs took: what is wrong with it is the scheduling, what is wrong only with the first is the profile. `--redraw` reads
earlier runs. Goals: means and throughput within 10 %, 99th percentiles within 20 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from transformers import AutoConfig

from benchmarks.recorded_steps import RecordedStepTimes, host_gaps
from ulysses_infer.bench.compare.contenders import CONTENDERS, GROUP, policy_of
from ulysses_infer.bench.compare.findings import ContenderRun, Findings, load_findings
from ulysses_infer.bench.compare.measuring import Site, measure
from ulysses_infer.bench.compare.protocols import (
    SATURATED,
    SCALES,
    Capacity,
    ComparisonCase,
    ProtocolInputs,
    shape,
    trace,
)
from ulysses_infer.bench.compare.servers import Servers, serve_command, server_overrides
from ulysses_infer.bench.random_model import SHAPES, random_model
from ulysses_infer.bench.serve.serve_bench import event_loop_factory
from ulysses_infer.bench.serve.traces import TraceRow
from ulysses_infer.child_processes import end_children_with_this_process
from ulysses_infer.config import Config, load_config
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.layouts import PlannedLayout
from ulysses_infer.planning.node import load_node
from ulysses_infer.planning.planner import Candidate, Planner
from ulysses_infer.planning.results import Figures
from ulysses_infer.planning.sizes import sizes_of
from ulysses_infer.planning.step_times import StepTimes
from ulysses_infer.step_time.profile import Profile

RUNS = ("tp", "sp", "shift", "adaptive")
NODE = "cpu-2cores"
MAX_MODEL_LEN = 8192
OVERRIDES = [
    "parallel.sp=2", f"model.max_model_len={MAX_MODEL_LEN}", "scheduler.max_num_seqs=64",
    "scheduler.max_num_batched_tokens=2048", "policy.name=adaptive",
]  # fmt: skip
METRICS = {
    "TTFT mean": ("ttft_mean_ms", 0.10), "TTFT p99": ("ttft_p99_ms", 0.20),
    "TPOT mean": ("tpot_mean_ms", 0.10), "TPOT p99": ("tpot_p99_ms", 0.20),
    "end to end mean": ("e2el_mean_ms", 0.10), "end to end p99": ("e2el_p99_ms", 0.20),
    "tokens/s": ("tokens_per_second", 0.10),
}  # fmt: skip
"""Key of a run's metrics, and the largest error that is hoped for."""


@dataclass(frozen=True)
class Study:
    """The runs of one model."""

    config: Config
    case: ComparisonCase
    profile: Profile
    runs: list[ContenderRun]


def main() -> None:
    """Measure, or read earlier runs; print a table per model."""
    end_children_with_this_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--seconds", type=float, default=45.0, help="of each of the four runs; default: %(default)s")
    parser.add_argument("--calibration-seconds", type=float, default=100.0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("judge_plan_here"), help="folder; default: %(default)s")
    parser.add_argument("--redraw", action="store_true", help="simulate the runs in --output again")
    options = parser.parse_args()
    for model in options.models:
        folder = options.output / model
        if not options.redraw:
            folder.mkdir(parents=True, exist_ok=True)
            with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
                runner.run(run(model, folder, options))
        report(model, study_of(model, folder))


# -- measuring -------------------------------------------------------------------------------------------------


async def run(model: str, folder: Path, options: argparse.Namespace) -> None:
    """Calibrate, serve, replay the slice under each policy; write everything to `folder`."""
    overrides = [f"model.path={random_model(model)}", *OVERRIDES]
    path = folder / "profile.json"
    arguments = ["--seconds", str(options.calibration_seconds), "--output", str(path), *overrides]
    command = serve_command(None, 2, arguments)
    command[command.index("serve")] = "calibrate"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    config = load_config(None, overrides)
    keys = server_overrides(GROUP, config, 2, is_adaptive=True, is_alone=True) | {"policy.profile": str(path)}
    served = serve_command(None, 2, [*overrides, *(f"{key}={value}" for key, value in keys.items())])
    findings = Findings({"model": model})
    with Servers({GROUP: served}, folder, in_turn=False) as servers:
        site = await Site.of(servers.get(GROUP).client, SHAPES[model]["vocab_size"])
        case = await _slice(site, options.trace, options.seconds)
        for name in RUNS:
            await site.set_policy(policy_of(CONTENDERS[name], config.policy.threshold_tokens))
            findings.runs.append(await measure(site, case, name, 0))
    findings.save(folder)
    (folder / "case.json").write_text(json.dumps(asdict(case)), encoding="utf-8")


async def _slice(site: Site, path: Path, seconds: float) -> ComparisonCase:
    """The trace, scaled to half of what the machine does when saturated; saturating it also warms it up."""
    sizes = replace(SCALES["laptop"], seconds=seconds).fitting(MAX_MODEL_LEN)
    inputs = ProtocolInputs(sizes, Capacity(0.0, 0.0), MAX_MODEL_LEN, [path])
    (saturated,) = (case for case in shape(inputs) if case.kind == SATURATED)
    done = await measure(site, saturated, "warm-up", 0)
    capacity = Capacity(done.metrics["requests_per_second"], done.metrics["tokens_per_second"])
    (case,) = trace(replace(inputs, capacity=capacity))
    first = case.rows[0].at
    return replace(case, rows=tuple(replace(row, at=row.at - first) for row in case.rows))


def study_of(model: str, folder: Path) -> Study:
    """What `run` wrote. Raises `ConfigError` or OSError if it is missing."""
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    rows = tuple(TraceRow(**{**row, "hash_ids": tuple(row["hash_ids"])}) for row in case.pop("rows"))
    config = load_config(None, [f"model.path={random_model(model)}", *OVERRIDES])
    profile = Profile.load(folder / "profile.json")
    return Study(config, ComparisonCase(**case, rows=rows), profile, load_findings(folder).runs)


# -- predicting ------------------------------------------------------------------------------------------------


class _TimedPlanner(Planner):
    """Takes its step times from elsewhere, if any are given."""

    def __init__(self, study: Study, step_times: StepTimes | None) -> None:
        sizes = sizes_of(AutoConfig.from_pretrained(study.config.model.path))
        super().__init__(
            sizes, load_node(NODE), study.config, profile=study.profile, tokens_per_hash=study.case.block_tokens
        )
        self._step_times = step_times

    def times(self, layout: PlannedLayout) -> StepTimes:
        """See `Planner.times`."""
        return self._step_times or super().times(layout)


def predicted(study: Study, name: str, times: StepTimes | None = None) -> Figures:
    """The figures of one run by the simulation."""
    own = _TimedPlanner(study, times)
    layout = next(layout for layout in own.usable if layout.base == Mode(2, 1))
    candidates = {
        "tp": Candidate(layout, "static", Mode(1, 2)),
        "sp": Candidate(layout, "static", Mode(2, 1)),
        "shift": Candidate(layout, "threshold", threshold=study.config.policy.threshold_tokens),
        "adaptive": Candidate(layout, "adaptive"),
    }
    return own.evaluate(candidates[name], study.case.rows, {}).figures


def metrics_of(figures: Figures) -> dict[str, float]:
    """The figures under the names of a run's metrics."""
    found = {"tokens_per_second": figures.tokens_per_second}
    for name, spread in (("ttft", figures.ttft), ("tpot", figures.tpot), ("e2el", figures.latency)):
        found |= {f"{name}_mean_ms": spread.mean, f"{name}_p99_ms": spread.p99}
    return found


def report(model: str, study: Study) -> None:
    """Print the table of one model."""
    recorded = RecordedStepTimes(study.runs, load_node(NODE).host.request_seconds)
    gap = mean(host_gaps(study.runs))
    print(f"\n{model}: {study.case.title}; {1e3 * gap:.2f} ms of host between steps")
    print(f"other programs kept {max(run.foreign_cores for run in study.runs):.2f} cores busy (0.1 is quiet)")
    columns = ["run", "figure", "measured", "plan", "error", "with the runs' own step times", "error", "goal"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for run in study.runs:
        ours, own = (metrics_of(predicted(study, run.contender, times)) for times in (None, recorded))
        for title, (key, goal) in METRICS.items():
            print(_row(run, title, key, goal, [ours[key], own[key]]))


def _row(run: ContenderRun, title: str, key: str, goal: float, predictions: Sequence[float]) -> str:
    truth = run.metrics[key]
    cells = [CONTENDERS[run.contender].title, title, f"{truth:,.1f}"]
    for value in predictions:
        error = value / truth - 1
        cells += [f"{value:,.1f}", f"{error:+.0%}{'' if abs(error) <= goal else ' !'}"]
    return f"| {' | '.join([*cells, f'{goal:.0%}'])} |"


if __name__ == "__main__":
    main()
