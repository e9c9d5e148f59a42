"""Compares `ulysses-infer plan` with runs of the engine on this machine.

Run from the repository root on a quiet machine: `python -m benchmarks.judge_plan_here TRACE`, 12 minutes. For each
model it calibrates two ranks as the adaptive policy does, serves the model, runs probes (a lone request and a saturated
server, in TP and in SP), replays a slice of the trace at half of the machine's capacity under each policy (static TP
and SP, threshold, adaptive: `bench compare`'s servers and client), and simulates the same requests with the measured
profile and what serving adds in the probes (`serving_costs`). A second prediction takes the mean times of the steps
that the runs took: what is wrong with it is the scheduling, what is wrong only with the first are the step times.
`--redraw` reads earlier runs. Goals: means and throughput within 10 %, 99th percentiles within 20 %.
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
from typing import Any

from transformers import AutoConfig

from benchmarks.recorded_steps import RecordedStepTimes, host_gaps
from benchmarks.serving_costs import Probe, fit_host, steps_by_kind
from ulysses_infer.bench.compare.contenders import CONTENDERS, GROUP, policy_of
from ulysses_infer.bench.compare.findings import ContenderRun, Findings, load_findings
from ulysses_infer.bench.compare.measuring import Site, measure
from ulysses_infer.bench.compare.protocols import (
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
from ulysses_infer.planning.node import Host, load_node
from ulysses_infer.planning.planner import Candidate, Planner
from ulysses_infer.planning.replica import ReplicaSettings
from ulysses_infer.planning.results import Figures
from ulysses_infer.planning.sizes import sizes_of
from ulysses_infer.planning.step_times import MeasuredStepTimes, StepTimes
from ulysses_infer.step_time.profile import Profile

PROBES = "probes"  # the folder of their results
RUNS = ("tp", "sp", "shift", "adaptive")
NODE = "cpu-2cores"
MODES = {"tp": Mode(1, 2), "sp": Mode(2, 1)}
MAX_MODEL_LEN = 8192
OVERRIDES = [
    "parallel.sp=2", f"model.max_model_len={MAX_MODEL_LEN}", "scheduler.max_num_seqs=64", "policy.name=adaptive",
]  # fmt: skip
MODELS = {"llama-60m": (2048, 80.0), "llama-0.5b": (1024, 150.0)}
"""Most tokens of a step, and seconds of calibration that suffice to measure steps of so many."""
METRICS = {
    "TTFT mean": ("ttft_mean_ms", 0.10), "TTFT p99": ("ttft_p99_ms", 0.20),
    "TPOT mean": ("tpot_mean_ms", 0.10), "TPOT p99": ("tpot_p99_ms", 0.20),
    "end to end mean": ("e2el_mean_ms", 0.10), "end to end p99": ("e2el_p99_ms", 0.20),
    "tokens/s": ("tokens_per_second", 0.10),
}  # fmt: skip
"""Key of a run's metrics, and the largest error that is hoped for."""
MOST_KINDS = 8  # of steps, per run, in the second table


@dataclass(frozen=True)
class Study:
    """The runs of one model."""

    config: Config
    case: ComparisonCase
    profile: Profile
    probes: list[Probe]
    runs: list[ContenderRun]


def main() -> None:
    """Measure, or read earlier runs; print a table per model."""
    end_children_with_this_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=40.0, help="of each of the four runs; default: %(default)s")
    parser.add_argument("--calibration-seconds", type=float, help="default: by model, 80 and 150")
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
    overrides = _overrides(model)
    path = folder / "profile.json"
    seconds = options.calibration_seconds or MODELS[model][1]
    arguments = ["--seconds", str(seconds), "--output", str(path), *overrides]
    command = serve_command(None, 2, arguments)
    command[command.index("serve")] = "calibrate"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    config = load_config(None, overrides)
    keys = server_overrides(GROUP, config, 2, is_adaptive=True, is_alone=True) | {"policy.profile": str(path)}
    served = serve_command(None, 2, [*overrides, *(f"{key}={value}" for key, value in keys.items())])
    findings = Findings({"model": model})
    with Servers({GROUP: served}, folder, in_turn=False) as servers:
        site = await Site.of(servers.get(GROUP).client, SHAPES[model]["vocab_size"])
        sizes = replace(SCALES["laptop"], seconds=options.seconds).fitting(MAX_MODEL_LEN)
        inputs = ProtocolInputs(sizes, Capacity(0.0, 0.0), MAX_MODEL_LEN, [options.trace])
        cases, probes = shape(inputs), Findings({"model": model})
        for name in MODES:
            await site.set_policy(policy_of(CONTENDERS[name], config.policy.threshold_tokens))
            probes.runs += [await measure(site, case, name, 0) for case in reversed(cases)]  # saturation warms up
        case = _slice(inputs, probes.runs)
        for name in RUNS:
            await site.set_policy(policy_of(CONTENDERS[name], config.policy.threshold_tokens))
            findings.runs.append(await measure(site, case, name, 0))
    findings.save(folder)
    (folder / PROBES).mkdir(exist_ok=True)
    probes.save(folder / PROBES)
    written = {"case": asdict(case), "probes": [asdict(each) for each in cases]}
    (folder / "cases.json").write_text(json.dumps(written), encoding="utf-8")


def _overrides(model: str) -> list[str]:
    most, _ = MODELS[model]
    return [f"model.path={random_model(model)}", *OVERRIDES, f"scheduler.max_num_batched_tokens={most}"]


def _slice(inputs: ProtocolInputs, probes: Sequence[ContenderRun]) -> ComparisonCase:
    """The trace, scaled to half of what the machine did at most."""
    best = max(probes, key=lambda run: run.metrics["tokens_per_second"]).metrics
    capacity = Capacity(best["requests_per_second"], best["tokens_per_second"])
    (case,) = trace(replace(inputs, capacity=capacity))
    first = case.rows[0].at
    return replace(case, rows=tuple(replace(row, at=row.at - first) for row in case.rows))


def study_of(model: str, folder: Path) -> Study:
    """What `run` wrote. Raises `ConfigError` or OSError if it is missing."""
    written = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    cases = {case.name: case for case in map(_read_case, written["probes"])}
    probes = [Probe(cases[run.case], MODES[run.contender], run) for run in load_findings(folder / PROBES).runs]
    profile, runs = Profile.load(folder / "profile.json"), load_findings(folder).runs
    return Study(load_config(None, _overrides(model)), _read_case(written["case"]), profile, probes, runs)


def _read_case(values: dict[str, Any]) -> ComparisonCase:
    rows = tuple(TraceRow(**{**row, "hash_ids": tuple(row["hash_ids"])}) for row in values.pop("rows"))
    return ComparisonCase(**values, rows=rows)


# -- predicting ------------------------------------------------------------------------------------------------


class _TimedPlanner(Planner):
    """Takes its step times from elsewhere."""

    def __init__(self, study: Study, step_times: StepTimes) -> None:
        sizes = sizes_of(AutoConfig.from_pretrained(study.config.model.path))
        super().__init__(
            sizes, load_node(NODE), study.config, profile=study.profile, tokens_per_hash=study.case.block_tokens
        )
        self._step_times = step_times

    @property
    def layout(self) -> PlannedLayout:
        """Two ranks that shift."""
        return next(layout for layout in self.usable if layout.base == Mode(2, 1))

    def times(self, layout: PlannedLayout) -> StepTimes:
        """See `Planner.times`."""
        return self._step_times


def served_times(study: Study) -> MeasuredStepTimes:
    """The profile, and what serving adds in the probes."""
    host = load_node(NODE).host
    return MeasuredStepTimes(study.profile, fit_host(study.probes, study.profile, _settings(study), host))


def _settings(study: Study) -> ReplicaSettings:
    planner = _TimedPlanner(study, MeasuredStepTimes(study.profile, load_node(NODE).host))
    return planner.settings(planner.layout)


def predicted(study: Study, name: str, times: StepTimes) -> Figures:
    """The figures of one run by the simulation."""
    own = _TimedPlanner(study, times)
    layout = own.layout
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
    served, notes = served_times(study), study.profile.notes
    print(f"\n{model} on {study.profile.key['device']}: {study.case.title}")
    print(f"{1e3 * gap:.2f} ms of host between steps; serving adds, by the probes: {_describe(served.host)}")
    if notes["unmeasured"]:
        print(f"not calibrated: {notes['unmeasured']} kinds of steps, up to {notes['longest_unmeasured']} tokens")
    print(f"other programs kept {max(run.foreign_cores for run in study.runs):.2f} cores busy (0.1 is quiet)")
    columns = ["run", "figure", "measured", "plan", "error", "with the runs' own step times", "error", "goal"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for run in study.runs:
        ours, own = (metrics_of(predicted(study, run.contender, times)) for times in (served, recorded))
        for title, (key, goal) in METRICS.items():
            print(_row(run, title, key, goal, [ours[key], own[key]]))
    _report_steps(study, served.host)


def _report_steps(study: Study, host: Host) -> None:
    """Where the profile errs: the kinds of steps of each run in one mode that took the most time, probes first."""
    runs = [
        *study.probes,
        *(Probe(study.case, MODES[run.contender], run) for run in study.runs if run.contender in MODES),
    ]
    print("\n| run | mode | steps | tokens | sequences | number | measured ms | plan ms | error |" + "\n|" + "---|" * 9)
    for probe in runs:
        for kind in steps_by_kind(probe, study.profile, _settings(study), host)[:MOST_KINDS]:
            cells = [probe.run.case, probe.run.contender, "with prompts" if kind.has_prompt else "decodes"]
            cells += [f"{kind.tokens:.0f}", f"{kind.sequences:.1f}", f"{kind.count}", f"{1e3 * kind.measured:.2f}"]
            cells += [f"{1e3 * kind.calibrated:.2f}", f"{kind.calibrated / kind.measured - 1:+.0%}"]
            print(f"| {' | '.join(cells)} |")


def _describe(host: Host) -> str:
    return (
        f"{host.core_share:.1%} of the cores, {1e3 * host.step_seconds:.2f} ms per step, "
        f"{1e3 * host.sequence_seconds:.2f} ms per sequence, {1e3 * host.request_seconds:.1f} ms per request"
    )


def _row(run: ContenderRun, title: str, key: str, goal: float, predictions: Sequence[float]) -> str:
    truth = run.metrics[key]
    cells = [CONTENDERS[run.contender].title, title, f"{truth:,.1f}"]
    for value in predictions:
        error = value / truth - 1
        cells += [f"{value:,.1f}", f"{error:+.0%}{'' if abs(error) <= goal else ' !'}"]
    return f"| {' | '.join([*cells, f'{goal:.0%}'])} |"


if __name__ == "__main__":
    main()
