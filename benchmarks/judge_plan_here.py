"""Compares `ulysses-infer plan` with runs of the engine on this machine.

Run from the repository root on a quiet machine: `python -m benchmarks.judge_plan_here TRACE`, 12 minutes per model. It
looks at the speed of the machine, by which it sizes everything else (`check_sizes`), calibrates two ranks like the
adaptive policy, serves the model, runs probes (a lone request and a saturated server, in TP and in SP), replays a slice
of the trace at half of the machine's capacity under each policy (static TP and SP, threshold, adaptive: `bench
compare`'s servers and client), and simulates the same requests with the measured profile and what serving adds in the
probes (`serving_costs`). A second prediction takes the mean times of the steps that the runs took: what is wrong with
it is the scheduling, what is wrong only with the first are the step times. Goals: means and throughput within 10 %,
99th percentiles within 20 %. When it is stopped, it reports the runs that are finished. `--redraw` reads earlier runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import AutoConfig

from benchmarks.check_sizes import SPEED_SHARE, CheckSizes, Speed, context_of
from benchmarks.recorded_steps import RecordedStepTimes, host_gaps
from benchmarks.serving_costs import Probe, fit_host, steps_by_kind
from ulysses_infer.atomic_files import write_atomically
from ulysses_infer.bench.compare.contenders import CONTENDERS, GROUP, policy_of
from ulysses_infer.bench.compare.findings import RESULTS, ContenderRun, Findings, load_findings
from ulysses_infer.bench.compare.measuring import Site, measure
from ulysses_infer.bench.compare.protocols import (
    SCALES,
    TIMED,
    TRACE_SHARE,
    Capacity,
    ComparisonCase,
    ProtocolInputs,
    shape,
)
from ulysses_infer.bench.compare.servers import Servers, serve_command, server_overrides
from ulysses_infer.bench.random_model import SHAPES, random_model
from ulysses_infer.bench.replay.scaling import PAPER_WINDOWS, thinned
from ulysses_infer.bench.serve.serve_bench import event_loop_factory
from ulysses_infer.bench.serve.traces import TraceRow, read_trace
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

PROBES, PROFILE, CASES = "probes", "profile.json", "cases.json"  # a folder, and files
RUNS = ("tp", "sp", "shift", "adaptive")
NODE = "cpu-2cores"
MODES = {"tp": Mode(1, 2), "sp": Mode(2, 1)}
LONGEST = 8192  # tokens of a request
OVERRIDES = ("parallel.sp=2", "scheduler.max_num_seqs=64", "policy.name=adaptive")
MODELS = {"llama-60m": 2048, "llama-0.5b": 1024}
"""Most tokens of a step."""
LOOK = {"scheduler.max_num_batched_tokens": 128, "model.max_model_len": 512}  # at the machine's speed
LOOK_SECONDS = 20.0  # at least: the first steps are slow
LEAST_SECONDS = 15.0  # of a run
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
    threshold: int
    """Tokens, of the threshold policy."""
    profile: Profile
    probes: list[Probe]
    runs: list[ContenderRun]


def main() -> None:
    """Measure, or read earlier runs; print a table per model."""
    end_children_with_this_process()
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--minutes", type=float, default=12.0, help="for each model; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("judge_plan_here"), help="folder; default: %(default)s")
    parser.add_argument("--redraw", action="store_true", help="simulate the runs in --output again")
    options = parser.parse_args()
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes {options.minutes:g} is not above 0")
    for model in options.models:
        if not check(model, options):
            sys.exit(128 + signal.SIGINT)


def check(model: str, options: argparse.Namespace) -> bool:
    """Measure a model and report what is finished; returns False if it was stopped."""
    folder, is_whole = options.output / model, True
    if not options.redraw:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).unlink(missing_ok=True)
        try:
            measure_model(model, folder, options)
        except KeyboardInterrupt:
            is_whole = False
            print(f"{model}: stopped", file=sys.stderr)
    if is_whole or (folder / RESULTS).exists():
        report(model, study_of(folder))
    return is_whole


# -- measuring -------------------------------------------------------------------------------------------------


def measure_model(model: str, folder: Path, options: argparse.Namespace) -> None:
    """Size the check by the machine's speed, calibrate, and run everything; write it to `folder`."""
    end = time.monotonic() + 60 * options.minutes
    overrides = [f"model.path={random_model(model)}", *OVERRIDES]
    look = [f"{key}={value}" for key, value in LOOK.items()]
    seconds = max(LOOK_SECONDS, SPEED_SHARE * 60 * options.minutes)
    speed = Speed.of(_calibrate(folder / "speed.json", seconds, [*overrides, *look]))
    sizes = CheckSizes.of(speed, options.minutes, MODELS[model])
    rows, block_tokens = sizes.scaled(_window(options.trace), LONGEST)
    most = sizes.max_num_batched_tokens
    overrides += [f"scheduler.max_num_batched_tokens={most}", f"model.max_model_len={context_of(rows)}"]
    _say(f"{model}: {speed.tokens_per_second:.0f} tokens/s, so {sizes.input_len} tokens in and {sizes.output_len} out")
    _calibrate(folder / PROFILE, sizes.calibration_seconds, overrides)
    source = ComparisonCase("trace", options.trace.stem, "", TIMED, tuple(rows), block_tokens=block_tokens)
    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        runner.run(run(model, folder, overrides, sizes, source, end))


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _window(path: Path) -> list[TraceRow]:
    rows = read_trace(path)
    return PAPER_WINDOWS[path.suffix].cut(rows) if path.suffix in PAPER_WINDOWS else rows


def _calibrate(path: Path, seconds: float, overrides: Sequence[str]) -> Profile:
    """Measure step times for so long."""
    command = serve_command(None, 2, ["--seconds", f"{seconds:.1f}", "--output", str(path), *overrides])
    command[command.index("serve")] = "calibrate"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Profile.load(path)


async def run(
    model: str, folder: Path, overrides: list[str], sizes: CheckSizes, source: ComparisonCase, end: float
) -> None:
    """Serve, probe, replay the slice under each policy; what is finished is in `folder`. end: of the time for it."""
    config = load_config(None, overrides)
    keys = server_overrides(GROUP, config, 2, is_adaptive=True, is_alone=True)
    keys["policy.profile"] = str(folder / PROFILE)
    served = serve_command(None, 2, [*overrides, *(f"{key}={value}" for key, value in keys.items())])
    with Servers({GROUP: served}, folder, in_turn=False) as servers:
        site = await Site.of(servers.get(GROUP).client, SHAPES[model]["vocab_size"])
        cases, probes = _probe_cases(sizes, config), Findings({"model": model})
        for name in MODES:
            await site.set_policy(policy_of(CONTENDERS[name], sizes.threshold))
            for case in reversed(cases):  # saturation warms up
                probes.runs.append(await measure(site, case, name, 0))
                _say(f"probe in {name}: {case.title}: {probes.runs[-1].metrics['tokens_per_second']:.0f} tokens/s")
        best = max(run.metrics["tokens_per_second"] for run in probes.runs)
        seconds = min(sizes.run_seconds, max(LEAST_SECONDS, 0.9 * (end - time.monotonic()) / len(RUNS)))
        case = slice_of(source, best, seconds)
        about = {"case": asdict(case), "threshold": sizes.threshold, "overrides": overrides}
        _save_probes(folder, probes, cases, about)
        findings = Findings({"model": model})
        for name in RUNS:
            await site.set_policy(policy_of(CONTENDERS[name], sizes.threshold))
            findings.runs.append(await measure(site, case, name, 0))
            findings.save(folder)
            _say(f"{name}: {len(case.rows)} requests in {findings.runs[-1].seconds:.0f} s")


def _probe_cases(sizes: CheckSizes, config: Config) -> list[ComparisonCase]:
    lengths = replace(
        SCALES["laptop"],
        input_len=sizes.input_len,
        output_len=sizes.output_len,
        num_lone=sizes.num_lone,
        num_saturated=sizes.num_saturated,
    )
    return shape(ProtocolInputs(lengths, Capacity(0.0, 0.0), config.model.max_model_len or LONGEST))


def _save_probes(folder: Path, probes: Findings, cases: Sequence[ComparisonCase], about: dict[str, Any]) -> None:
    (folder / PROBES).mkdir(exist_ok=True)
    probes.save(folder / PROBES)
    write_atomically(folder / CASES, json.dumps({**about, "probes": [asdict(each) for each in cases]}))


def slice_of(source: ComparisonCase, tokens_per_second: float, seconds: float) -> ComparisonCase:
    """So many of the requests that a machine which does `tokens_per_second` at most is half busy, within `seconds`."""
    mean_tokens = mean(row.input_len + row.output_len for row in source.rows)
    rows = thinned(source.rows, max(2, round(TRACE_SHARE * tokens_per_second * seconds / mean_tokens)))
    factor = seconds / max(rows[-1].at - rows[0].at, 1e-9)
    rows = [replace(row, at=(row.at - rows[0].at) * factor) for row in rows]
    lengths = (mean(getattr(row, name) for row in rows) for name in ("input_len", "output_len"))
    title = "{}: {} of {} requests in {:.3g} s, on average {:.0f} tokens in, {:.0f} out".format(
        source.name, len(rows), len(source.rows), seconds, *lengths
    )
    return replace(source, title=title, rows=tuple(rows))


def study_of(folder: Path) -> Study:
    """What `run` wrote. Raises `ConfigError` or OSError if it is missing."""
    written = json.loads((folder / CASES).read_text(encoding="utf-8"))
    cases = {case.name: case for case in map(_read_case, written["probes"])}
    probes = [Probe(cases[run.case], MODES[run.contender], run) for run in load_findings(folder / PROBES).runs]
    profile, runs = Profile.load(folder / PROFILE), load_findings(folder).runs
    config, case = load_config(None, written["overrides"]), _read_case(written["case"])
    return Study(config, case, written["threshold"], profile, probes, runs)


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
        "shift": Candidate(layout, "threshold", threshold=study.threshold),
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
