"""What serving adds to steps is found again in runs to which it was added."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest

from benchmarks.serving_costs import Probe, _LoggedStepTimes, fit_host
from tests.planning.plans import operations
from ulysses_infer.bench.compare.findings import ContenderRun, RequestRow, StepRow
from ulysses_infer.bench.compare.protocols import LONE, SATURATED, ComparisonCase
from ulysses_infer.bench.serve.traces import TraceRow
from ulysses_infer.config import SchedulerConfig
from ulysses_infer.engine.calibration_points import Limits
from ulysses_infer.engine.policies import StaticPolicy
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.node import Host, load_node
from ulysses_infer.planning.replica import ReplicaSettings, SimulatedReplica
from ulysses_infer.planning.simulation import Fleet, simulate
from ulysses_infer.planning.step_times import AnalyticStepTimes, profile_of
from ulysses_infer.step_time.profile import Profile

NODE = load_node("cpu-2cores")
MODE = Mode(1, 2)
SETTINGS = ReplicaSettings(SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256), 512, 16, 2048)
ADDED = replace(NODE.host, core_share=0.06, step_seconds=0.4e-3, sequence_seconds=0.8e-3, request_seconds=5e-3)


def probe(kind: str, count: int, profile: Profile, host: Host) -> Probe:
    """A run as it would be with these costs."""
    case = ComparisonCase("shape", kind, kind, kind, (TraceRow(0.0, 300, 20),) * count)
    times = _LoggedStepTimes(profile, host)
    most = 1 if kind == LONE else None
    fleet = Fleet(1, lambda: SimulatedReplica(SETTINGS, times, StaticPolicy(MODE)))
    result = simulate(case.rows, fleet, host.request_seconds, most)
    starts = accumulate((seconds for _, seconds in times.steps), initial=0.0)
    steps = [
        StepRow(start, seconds, *MODE, shape.num_tokens, shape.num_decodes)
        for start, (shape, seconds) in zip(starts, times.steps, strict=False)
    ]
    rows = [RequestRow(each.arrived, each.ttft, each.tpot, each.latency, 300, 20, 0, "") for each in result.requests]
    return Probe(case, MODE, ContenderRun("tp", kind, 0, {}, rows, steps, []))


def test_costs_that_were_added_are_found():
    profile = profile_of(AnalyticStepTimes(operations(NODE), [MODE]), Limits(256, 16, 2048, 8192))
    probes = [probe(LONE, 4, profile, ADDED), probe(SATURATED, 16, profile, ADDED)]
    found = fit_host(probes, profile, SETTINGS, NODE.host)
    assert found.core_share == pytest.approx(ADDED.core_share, abs=0.01)
    assert found.sequence_seconds == pytest.approx(ADDED.sequence_seconds, rel=0.1)
    assert found.step_seconds == pytest.approx(ADDED.step_seconds, abs=0.3e-3)
    assert found.request_seconds == pytest.approx(ADDED.request_seconds, rel=0.1)
